# Everything from a bare clone: `make demo` draws a picture, `make test` runs the tests; both set up what they need first.
PYTHON ?= python3
VENV ?= .venv
PIP ?= $(VENV)/bin/python -m pip

INSTALLED := $(VENV)/.installed

.PHONY: help demo test lint types clean

help:
	@echo "make demo   two personal subjects placed by a layout, drawn by the embedded base model (no download, no GPU)"
	@echo "make test   the test suite"
	@echo "make lint   ruff: style and formatting"
	@echo "make types  mypy"
	@echo "make clean  remove $(VENV)"
	@echo "Settings: PYTHON=$(PYTHON) VENV=$(VENV) PIP=\"$(PIP)\""

# torch goes first and alone, so that PIP_EXTRA_INDEX_URL or an installed build can choose another one (CPU only, CUDA, ROCm).
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/python generate_images.py --generation_config configs/guidance_conf_two.json --num_inference_steps 25

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy takes the package's name from its folder, and a clone may have any: check it through a link of the right name.
types: $(INSTALLED)
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/multisubject
	cd $(VENV)/types && "$(abspath $(VENV))/bin/mypy" --config-file multisubject/pyproject.toml -p multisubject

clean:
	rm -rf $(VENV)
