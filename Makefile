# Everything from a bare clone: `make demo` draws a picture, `make test` runs the tests; both set up what they need first.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 7860
PIP ?= $(VENV)/bin/python -m pip

PACKAGE := $(VENV)/.installed-package
PAGE := $(VENV)/.installed-page
INSTALLED := $(VENV)/.installed

# The tests whose answers depend on how a processor sums; two workers, since a thread more is of no use to tiny models.
NUMERICAL := tests/test_pipeline.py tests/test_attention_processors.py tests/test_cones2_reference.py \
	tests/test_guidance_methods.py tests/test_residual_embeddings.py tests/test_train_residual.py tests/test_train_base.py
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist worksteal

.PHONY: help demo page test test-processors test-plain lint types clean

help:
	@echo "make demo             two personal subjects placed by a layout, drawn by the embedded base model (no download, no GPU)"
	@echo "make page             the page on which layouts are drawn, at http://127.0.0.1:7860 (PORT=… for another)"
	@echo "make test             the test suite"
	@echo "make test-processors  the numerical tests as on a processor with AVX2, and on one with SSE alone"
	@echo "make test-plain       pip install without constraints.txt, into an environment of its own: does it work today?"
	@echo "make lint             ruff: style and formatting"
	@echo "make types            mypy"
	@echo "make clean            remove $(VENV)"
	@echo "Settings: PYTHON=$(PYTHON) VENV=$(VENV) PIP=\"$(PIP)\""

# The first picture and the page are there sooner without what only the checks need.
$(PACKAGE): EXTRA :=
$(PAGE): EXTRA := [page]
$(INSTALLED): EXTRA := [dev]

# torch goes first and alone, so that PIP_EXTRA_INDEX_URL or an installed build can choose another one (CPU only, CUDA, ROCm).
$(PACKAGE) $(PAGE) $(INSTALLED): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".$(EXTRA)"
	touch $(PACKAGE) $@

demo: $(PACKAGE)
	$(VENV)/bin/python generate_images.py --generation_config configs/guidance_conf_two.json --num_inference_steps 25

page: $(PAGE)
	$(VENV)/bin/multisubject-page --port $(PORT)

test: $(INSTALLED)
	$(PYTEST)

test-processors: $(INSTALLED)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) -m "not slow" $(NUMERICAL)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(PYTEST) -m "not slow" $(NUMERICAL)

# A wheel is built and installed, as from an index, and has to build without a warning. torch is given, as above.
test-plain:
	$(PYTHON) -m venv $(VENV)-plain
	$(VENV)-plain/bin/python -m pip install -c constraints.txt torch
	$(VENV)-plain/bin/python -m pip wheel --verbose --no-deps --wheel-dir $(VENV)-plain/wheel . >$(VENV)-plain/build.log 2>&1 \
		|| (cat $(VENV)-plain/build.log; exit 1)
	! grep -i -A 3 "warning" $(VENV)-plain/build.log | grep -v "^WARNING: \|byte-compiling is disabled" | grep -i -A 3 warning
	$(VENV)-plain/bin/python -m pip install $(VENV)-plain/wheel/*.whl pytest hypothesis scipy
	$(VENV)-plain/bin/python -m pip check
	$(VENV)-plain/bin/python -m pytest -m "not slow" tests/test_pipeline.py tests/test_attention_processors.py \
		tests/test_hub_utils.py -k "test_pipeline or lora"

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy takes the package's name from its folder, and a clone may have any: check it through a link of the right name.
types: $(INSTALLED)
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/multisubject
	cd $(VENV)/types && "$(abspath $(VENV))/bin/mypy" --config-file multisubject/pyproject.toml -p multisubject

clean:
	rm -rf $(VENV) $(VENV)-plain
