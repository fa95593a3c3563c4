# Everything a user needs: Python 3.11 or newer and make. `make help` lists the targets.

PYTHON ?= python3
TOOLS := .venv/tools
UV := $(TOOLS)/bin/uv
STACK := $(TOOLS)/bin/python -m deploy.embedded
PAIR := $(TOOLS)/bin/python -m deploy.pair
SERVICES := order mail

.DEFAULT_GOAL := help
.PHONY: help run demo shell orders order reconcile unit test test-long check fuzz bench bench-peers up down logs env env-dev lock clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

run: env ## Start the pair with everything it needs, place an order, show its mail; Ctrl-C ends it
	@$(STACK) run

demo: env ## The same, and end after the mail
	@$(STACK) demo

shell: env ## Open a second terminal on the pair that runs: its commands, Kafka's tools, addresses
	@$(STACK) shell

orders: env ## Place N=20 orders
	@$(PAIR) orders $(or $(N),20)

order: env ## Show each hop of the order ID=…
	@$(PAIR) order $(ID)

reconcile: env ## Name orders without mail, mails without order, doubles; FROM=… TO=…, else a day
	@$(PAIR) reconcile $(if $(FROM),--from $(FROM)) $(if $(TO),--to $(TO))

unit: env-dev ## Run the tests that need nothing running
	@$(TOOLS)/bin/python tests/suites.py unit

test: env-dev ## Run all tests on real Kafka, PostgreSQL and SMTP
	@$(TOOLS)/bin/python tests/suites.py

test-long: env-dev ## Run the mail service's faults with the catalogue's own counts; an hour
	@TEST_LONG=1 $(TOOLS)/bin/python -m pytest tests/faults/mail -v --timeout 3600

check: env-dev ## Lint, types, import direction, migrations against the models
	$(TOOLS)/bin/ruff check .
	$(TOOLS)/bin/ruff format --check .
	$(foreach s,$(SERVICES),$(TOOLS)/bin/mypy --python-executable .venv/$(s)/bin/python $(s)_service/src &&) true
	$(TOOLS)/bin/mypy -p deploy.embedded
	$(TOOLS)/bin/mypy -m deploy.pair
	$(TOOLS)/bin/mypy -m benchmarks.post -m benchmarks.relay -m benchmarks.mail -m benchmarks.peers.__main__
	$(TOOLS)/bin/mypy --python-executable .venv/order/bin/python -m benchmarks.bare -m benchmarks.tokens
	$(TOOLS)/bin/mypy --python-executable .venv/mail/bin/python -m benchmarks.mail_alone
	$(foreach s,$(SERVICES),(cd $(s)_service && PYTHONPATH=src ../$(TOOLS)/bin/lint-imports --no-cache) &&) true
	$(STACK) with --fresh order-db,mail-db -- sh deploy/check-migrations.sh

fuzz: env-dev ## Try the API with 10,000 generated requests
	@FUZZ_CASES=10000 $(TOOLS)/bin/python -m pytest tests/api/test_schemathesis.py -q

bench: env ## Measure POST /v1/orders beside its limits, the relay, and the mail service
	@$(TOOLS)/bin/python -m benchmarks.post
	@$(TOOLS)/bin/python -m benchmarks.relay
	@$(TOOLS)/bin/python -m benchmarks.mail

bench-peers: env ## Measure the mail service beside Celery and FastStream; needs redis-server
	@$(TOOLS)/bin/python -m benchmarks.peers

up: ## Start the pair in containers; needs Docker with Compose v2
	@sh deploy/make-secrets.sh
	@docker compose up --detach --build --wait
	@docker compose exec -T order-api order-service products load /etc/order-service/products.csv
	@docker compose ps --format 'table {{.Service}}\t{{.Status}}\t{{.Ports}}'

down: ## Stop the containers; their volumes stay
	@docker compose down

logs: ## Follow the containers' logs
	@docker compose logs --follow --tail 100

# One environment for each service and one for tools. uv is the only thing pip installs.
env: $(TOOLS)/.installed $(SERVICES:%=.venv/%/.installed)
env-dev: env $(SERVICES:%=.venv/%/.installed-dev)

$(UV): bootstrap.lock
	@echo "making the environments…"
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $<
	@touch $@

$(TOOLS)/.installed: requirements.lock $(UV)
	@$(UV) pip install --quiet --python $(TOOLS)/bin/python --require-hashes -r $<
	@touch $@

.venv/%/.installed: %_service/requirements.lock %_service/pyproject.toml $(UV)
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv/$*
	@$(UV) pip install --quiet --python .venv/$*/bin/python --require-hashes -r $<
	@$(UV) pip install --quiet --python .venv/$*/bin/python --no-deps --editable $*_service
	@touch $@

.venv/%/.installed-dev: %_service/requirements-dev.lock .venv/%/.installed
	@$(UV) pip install --quiet --python .venv/$*/bin/python --require-hashes -r $<
	@touch $@

COMPILE := $(UV) pip compile --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header --quiet

lock: $(UV) ## Resolve the dependencies anew
	$(COMPILE) --group tools --output-file requirements.lock
	$(foreach s,$(SERVICES),$(COMPILE) $(s)_service/pyproject.toml --output-file $(s)_service/requirements.lock && \
		$(COMPILE) $(s)_service/pyproject.toml --extra dev --constraints $(s)_service/requirements.lock \
		--output-file $(s)_service/requirements-dev.lock &&) true

clean: ## Remove the environments and the state of the stack
	rm -rf .venv .run
