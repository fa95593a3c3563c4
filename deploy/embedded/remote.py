"""`stack`: the running stack's verbs in a second terminal, in compose's words."""

import argparse
import json
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.embedded.errors import NotRunningError, StackError, WrongUsageError
from deploy.embedded.ports import HOST
from deploy.embedded.state import KEPT, State

CONNECT_SECONDS = 5.0
# Above what the stack waits for its turn, and a start or a stop takes at most.
ANSWER_SECONDS = 240.0
POLL_SECONDS = 0.2
LOG_LINES = 100
EXIT_USAGE = 2
EXIT_FAILED = 3
EXIT_INTERRUPTED = 130


def ask(root: Path, verb: str, **details: Any) -> Any:
    """Return what the stack on this state directory answers; raise StackError when it says no."""
    try:
        note = json.loads(State(root).control.read_text())
        address, secret = (HOST, note["port"]), note["secret"]
    except (OSError, ValueError) as error:
        raise _not_running(root) from error
    request = {"verb": verb, **details}
    line = json.dumps({"secret": secret, "request": request}).encode() + b"\n"
    try:
        with socket.create_connection(address, CONNECT_SECONDS) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(line)
            with connection.makefile("rb") as answers:
                answer = json.loads(answers.readline())
    except ConnectionRefusedError as error:
        raise _not_running(root) from error
    except (OSError, ValueError) as error:
        raise StackError(f"the stack did not answer: {error}") from error
    if "error" in answer:
        kind = WrongUsageError if answer.get("is_usage") else StackError
        raise kind(answer["error"])
    return answer


def _not_running(root: Path) -> NotRunningError:
    return NotRunningError(f"no pair is running on {root}; start one with: make run")


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says and return the exit code."""
    options = _parse(arguments)
    try:
        match options.verb:
            case "ps":
                _print_parts(ask(options.state, "ps")["parts"], as_json=options.as_json)
            case "logs":
                _logs(State(options.state), options.part, is_followed=options.follow)
            case "scale":
                part, count = options.scale
                _tell("scale", ask(options.state, "scale", part=part, count=count)["done"])
            case verb:
                _tell(verb, ask(options.state, verb, parts=options.parts)["done"])
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (StackError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_USAGE if isinstance(error, WrongUsageError) else EXIT_FAILED
    return 0


def _tell(verb: str, names: Sequence[str]) -> None:
    outcome = {
        "start": "started",
        "stop": "stopped",
        "kill": "killed, comes back",
        "scale": "runs",
    }[verb]
    for name in names:
        sys.stdout.write(f"{name}  {outcome}\n")


def _print_parts(parts: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(parts) + "\n")
        return
    table = [("NAME", "PHASE", "PID", "AGE")]
    table += [
        (part["name"], part["phase"], str(part["pid"] or ""), _age(part["age_seconds"]))
        for part in parts
    ]
    for name, phase, pid, age in table:
        sys.stdout.write(f"{name:<12} {phase:<9} {pid:>7}  {age}".rstrip() + "\n")


def _age(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _logs(state: State, name: str, *, is_followed: bool) -> None:
    there = sorted(path.stem for path in state.log(name).parent.glob("*.log"))
    if name not in there:
        raise WrongUsageError(f"there is no log of {name}; there are {', '.join(there) or 'none'}")
    with state.log(name).open(encoding="utf-8", errors="replace") as log:
        sys.stdout.writelines(deque(log, LOG_LINES))
        sys.stdout.flush()
        while is_followed and state.control.exists():
            time.sleep(POLL_SECONDS)
            sys.stdout.write(log.read())
            sys.stdout.flush()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="stack", description="The running stack's parts.")
    parser.add_argument("--state", type=Path, default=KEPT, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    ps = verbs.add_parser("ps", help="list the parts: phase, process id, age")
    ps.add_argument("--json", action="store_true", dest="as_json", help="for scripts")
    for verb, what in (
        ("start", "start what was stopped"),
        ("stop", "stop, and leave stopped"),
        ("kill", "kill like a crash would; it comes back"),
    ):
        verbs.add_parser(verb, help=what).add_argument("parts", nargs="+", metavar="PART")
    scale = verbs.add_parser("scale", help="run so many mail replicas")
    scale.add_argument("scale", type=_scale, metavar="mail=N")
    logs = verbs.add_parser("logs", help=f"print the last {LOG_LINES} lines of a part's log")
    logs.add_argument("-f", "--follow", action="store_true", help="and what comes, until Ctrl-C")
    logs.add_argument("part", metavar="PART")
    return parser.parse_args(arguments)


def _scale(text: str) -> tuple[str, int]:
    part, _, count = text.partition("=")
    if not count.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: write mail=3")
    return part, int(count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
