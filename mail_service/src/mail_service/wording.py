"""The template folder: an order's facts → subject, text and HTML in one language.

A folder of the installation's own (MAIL_TEMPLATES) comes first, file by file. All are read,
inlined and tried once, at the start, and what is the same in every mail is put in its place then.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from css_inline import CSSInliner, InlineError
from jinja2 import (
    ChoiceLoader,
    Environment,
    FileSystemLoader,
    PackageLoader,
    StrictUndefined,
    Template,
    TemplateError,
    nodes,
    select_autoescape,
)
from jinja2.visitor import NodeTransformer

JINJA = re.compile(r"\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", re.DOTALL)
MARK = re.compile(r"<!--jinja-(\d+)-->|jinja-(\d+)-")


class BrokenTemplate(Exception):
    """A file of the template folder cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Wording:
    """What one mail says."""

    subject: str
    text: str
    html: str


class Templates:
    """The templates of one language; `fixed` are the facts that no mail differs in."""

    def __init__(self, language: str, folder: Path | None, fixed: Mapping[str, str]) -> None:
        names = (f"words.{language}.txt", "confirmation.txt", "confirmation.html")
        package = PackageLoader("mail_service")
        self._loader = ChoiceLoader([FileSystemLoader(folder), package] if folder else [package])
        self._environment = Environment(
            loader=self._loader,
            autoescape=select_autoescape(["html"], default_for_string=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        # With Jinja's own, which sorts, json makes an encoder for each mail.
        self._environment.policies["json.dumps_kwargs"] = {}
        with _usable():
            self.source = "\0".join(self._source(name) for name in names)
            words = self._folded(self._source(names[0]), names[0], fixed)
            blocks = self._fixed_blocks(words, names[0])
            known = {**fixed, **{f"words.{name}": text for name, text in blocks.items()}}
            text, html = self._source(names[1]), _inlined(self._source(names[2]))
            self._words = self._compiled(words, names[0])
            self._text = self._compiled(self._folded(text, names[1], known), names[1])
            self._html = self._compiled(self._folded(html, names[2], known), names[2])

    def say(self, facts: Mapping[str, Any]) -> Wording:
        """Put facts into words; raises BrokenTemplate."""
        with _usable():
            words = self._words.make_module(dict(facts))
            text, html = (
                template.render(facts, words=words) for template in (self._text, self._html)
            )
            return Wording(str(words.subject), text, html)  # type: ignore[attr-defined]

    def _source(self, name: str) -> str:
        return self._loader.get_source(self._environment, name)[0]

    def _folded(self, source: str, name: str, known: Mapping[str, str]) -> nodes.Template:
        """Parse a template and write what is known into it, unless it gives such a name itself."""
        template = self._environment.parse(source, name)
        if template.find(nodes.Extends) is not None:
            # What it extends may give any name a value of its own.
            return template
        own = _names_given(template)
        kept = {path: text for path, text in known.items() if path.partition(".")[0] not in own}
        return cast(nodes.Template, _Folder(kept).visit(template))

    def _fixed_blocks(self, template: nodes.Template, name: str) -> dict[str, str]:
        """Return what the blocks say that nothing but fixed text is left in, by their names."""
        if template.find(nodes.Extends) is not None:
            return {}
        context = nodes.EvalContext(self._environment, name)
        times = _names_given(template)
        fixed = {}
        for block in template.body:
            if isinstance(block, nodes.AssignBlock) and isinstance(block.target, nodes.Name):
                # One that is given twice may be so under a condition.
                with suppress(nodes.Impossible):
                    if times[block.target.name] == 1:
                        fixed[block.target.name] = _text_of(block, context)
        return fixed

    def _compiled(self, template: nodes.Template, name: str) -> Template:
        code = self._environment.compile(template, name)
        # One dictionary: each mail's context begins as a copy of it.
        return Template.from_code(self._environment, code, dict(self._environment.globals))


class _Folder(NodeTransformer):
    """Writes what is known for a name, or an attribute of one; Jinja joins what is fixed then."""

    def __init__(self, known: Mapping[str, str]) -> None:
        self._known = known

    def visit_Name(self, node: nodes.Name) -> nodes.Node:  # noqa: N802 - as Jinja calls it
        return self._known_for(node, node.name) if node.ctx == "load" else node

    def visit_Getattr(self, node: nodes.Getattr) -> nodes.Node:  # noqa: N802
        owner = node.node.name if isinstance(node.node, nodes.Name) else ""
        return self.generic_visit(self._known_for(node, f"{owner}.{node.attr}"))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Leave it: of what is fixed Jinja forgets which part was HTML already."""
        return node

    def _known_for(self, node: nodes.Expr, path: str) -> nodes.Expr:
        if path not in self._known:
            return node
        return nodes.Const(self._known[path], lineno=node.lineno, environment=node.environment)


def _names_given(template: nodes.Template) -> Counter[str]:
    """Count the places where a template gives each of its own names a value."""
    given = Counter(each.name for each in template.find_all(nodes.Name) if each.ctx != "load")
    given.update(each.name for each in template.find_all(nodes.Macro))
    given.update(each.target for each in template.find_all(nodes.Import))
    for imported in template.find_all(nodes.FromImport):
        given.update(name if isinstance(name, str) else name[1] for name in imported.names)
    return given


def _text_of(block: nodes.AssignBlock, context: nodes.EvalContext) -> str:
    """Return a block's text; raise Impossible when a mail can change it."""
    if block.filter is not None or not all(isinstance(part, nodes.Output) for part in block.body):
        raise nodes.Impossible
    parts = [child for part in block.body for child in cast(nodes.Output, part).nodes]
    return "".join(str(part.as_const(context)) for part in parts)


def _inlined(source: str) -> str:
    """Put a template's styles into its tags: mail clients drop style sheets."""
    inliner = CSSInliner(
        keep_at_rules=True, load_remote_stylesheets=False, resolve_css_variables=True
    )
    tags: list[str] = []

    def hide(tag: re.Match[str]) -> str:
        """Put a mark that an HTML parser leaves where it is, in a table too."""
        tags.append(tag.group())
        mark = f"jinja-{len(tags) - 1}"
        return f"{mark}-" if tag.group().startswith("{{") else f"<!--{mark}-->"

    inlined = inliner.inline(JINJA.sub(hide, source))
    return MARK.sub(lambda mark: tags[int(mark[1] or mark[2])], inlined)


@contextmanager
def _usable() -> Iterator[None]:
    """Turn every way in which a template fails into BrokenTemplate."""
    try:
        yield
    except (TemplateError, InlineError, OSError, UnicodeDecodeError) as error:
        raise BrokenTemplate(f"{type(error).__name__}: {error}") from error
