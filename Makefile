# make train: prepare a corpus, pretrain a small FlashMHF, print what came out.
# make test:  the tests.      make check: lint, format, types.
# make test-faults: kills, damage and full disks, many times over; all that ends a job early, on a real SLURM.
# Each sets up .venv by itself; PYTHON=python3.12 make ... picks the interpreter.
PYTHON ?= python3
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
VENV := .venv
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
PAPER_ROWS := docs/measured/2026-11-28-h200
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: train test test-fast test-faults check sizes evidence clean

train: $(INSTALLED)
	$(VENV)/bin/mhf data prepare --config configs/quickstart_data.yaml
	$(VENV)/bin/mhf fit --config configs/model/flash_mhf.yaml --config configs/quickstart.yaml --run_dir $(RUN)

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not serial and not gpu"; \
	parallel=$$?; $(VENV)/bin/python -m pytest -m "serial or gpu" && exit $$parallel

test-fast: $(READY)
	$(VENV)/bin/python -m pytest -m "not slow"

test-faults: $(READY)
	MHF_FAULTS=full $(VENV)/bin/python -m pytest -s tests/faults tests/slurm

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

sizes: $(INSTALLED)
	$(VENV)/bin/python configs/size_table.py > configs/paper/SIZES.md

evidence: $(INSTALLED)
	$(VENV)/bin/mhf evidence table configs/evidence/events/*.tar.gz --out docs/evidence
	rm -f docs/evidence/efficiency.md
	$(VENV)/bin/mhf evidence efficiency --layer $(PAPER_ROWS)/paper-layer.csv --model $(PAPER_ROWS)/paper-model.csv \
		--out docs/evidence/efficiency.md

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 13) else "Python 3.10 to 3.13 is needed; set PYTHON=python3.12 or the like")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $(INSTALLED)

# With DeepSpeed, for the tests alone: its build imports torch, so it comes after the rest.
$(READY): $(INSTALLED)
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install -q -c constraints.txt --no-build-isolation deepspeed
	@touch $(READY)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
