# make demo   environment, real data, two-process training, evaluation on unseen identities, report
# make check  environment, lint, types, all tests that start no process: what a developer runs all day
# make test   make check and all other tests but those of make soak: what CI runs
# make soak   what takes longer than a suite may, part by part; PART=name: that part
PYTHON ?= python3
# A font set that `partial-fc prepare glyphs` knows by name, or a folder of TTF/OTF files.
FONTS ?= small
# Beginnings of the names of fonts to keep for testing; unset: brush, display and pixel fonts of the small set.
HOLD_OUT ?=
BIN := .venv/bin
# One thread a process: several ranks share the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: demo check test lint soak clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Two files side by side: many tests start processes or ranks, and wait for them. Each worker keeps pools of up to four
# ranks; together they used 8 GB of memory. mypy beside them: it takes 17 s of one core after an installation, then 1 s.
TESTS = $(BIN)/mypy & types=$$!; $(BIN)/python -m pytest -n 2 --dist loadfile

check: lint
	$(TESTS) -m "not slow and not gpu"; tests=$$?; wait $$types && exit $$tests

test: lint
	$(TESTS); tests=$$?; wait $$types && exit $$tests

demo: .venv/installed
	@test ! -f data/glyphs_demo/train/index.json || echo "data/glyphs_demo is used as it is; delete it to prepare it anew"
	test -f data/glyphs_demo/train/index.json || \
	  $(BIN)/partial-fc prepare glyphs $(FONTS) data/glyphs_demo --size 32 $(if $(HOLD_OUT),--hold-out $(HOLD_OUT))
	$(BIN)/torchrun --nproc_per_node=2 launch/train.py configs/glyphs_demo.yaml
	@echo "run folder: runs/glyphs_demo   report: runs/glyphs_demo/report.html   (another make demo goes on from what is there)"

soak: .venv/installed
	$(BIN)/python -m tests.soak $(PART)

clean:
	rm -rf .soak.json .mypy_cache data/glyphs_ci data/glyphs_ci.lock data/glyphs_demo runs/glyphs_ci runs/glyphs_demo .pytest_cache .ruff_cache
