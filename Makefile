# make demo    sets everything up, shows the student that ships beside the dense model, adapts it to BUDGET, compares all three
# make test    passes the tests
# Both need Python 3.11+ and nothing else: no GPU, no account, no downloads besides Python packages.

SHELL  := bash
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TRITON ?= $(if $(filter Linux,$(shell uname -s)),triton==3.7.1)
BIN     = $(VENV)/bin
LAUNCH  = $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: setup demo test lint wan-mini results report ablation-students ablation budgets kernels-report bench-gpu

setup: $(VENV)/.ready

# torch is named first: an open range would bring gigabytes of CUDA packages to a laptop; Triton as torch's own CUDA build names it
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" $(TRITON)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

data/shards/camera/index.json: | setup
	$(BIN)/python data/prepare.py --camera-motion 960 --seed 1 --split val=0.05 --model data/wan-mini --out data/shards/camera

data/shards/demo/index.json: | setup
	$(BIN)/python data/prepare.py --camera-motion 160 --seed 1 --split val=0.05 --model data/wan-mini --out data/shards/demo

# First what is there already; then a student of the newcomer's own: a share of the dense forward's FLOPs, from 0.23 (make demo BUDGET=0.3).
BUDGET ?= 0.24
SHIPS   = data/students/usv_few_step
YOURS   = outputs/demo/budget_$(BUDGET)
demo: setup
	$(BIN)/python infer.py ckpt=$(SHIPS) compare=true decoder=tiny output_dir=outputs/demo/first prompt='"a cat, the camera pans left"'
	$(MAKE) data/shards/demo/index.json
	$(LAUNCH) train.py experiment=usv_adapt policy.budget=$(BUDGET) data.path=data/shards/demo data.validation_clips=8 logger.videos=false output_dir=$(YOURS)
	$(BIN)/python -m usv.evaluate --ckpt ships=$(SHIPS) --ckpt yours=$(YOURS)/student --decoder tiny --clips 20 --out $(YOURS)/results.json --videos $(YOURS)/videos
	@echo "Look:     $(YOURS)/videos/contact_sheet.png, and beside it videos dense | ships | yours"
	@echo "Generate: $(BIN)/python infer.py ckpt=$(YOURS)/student compare=true prompt='\"a horse silhouette, the camera zooms in\"'"
	@echo "Next:     make demo BUDGET=0.4 is another student; from nothing, half an hour: $(BIN)/accelerate launch train.py; your own videos: README.md"

lint: setup
	$(BIN)/ruff check .

# two processes of one thread each: half the time of one of two threads; a file's tests stay together, they share models, and long files come first
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# the embedded model from nothing; resumable
wan-mini: setup
	$(BIN)/python data/build_wan_mini.py

# the README's first table and that of the peers, and its pictures, from the shipped checkpoints, on two cores; other students: make results CKPTS="--ckpt mine=FOLDER"
STUDENTS   ?= $(sort $(patsubst data/students/%/config.json,%,$(wildcard data/students/*/config.json)))
# and the few-step student in its first step alone
CKPTS      ?= $(foreach name,$(STUDENTS),--ckpt data/students/$(name)) --ckpt usv_one_step=data/students/usv_few_step@1000
CLIPS      ?= 120
PEER_CLIPS ?= 16
BATCH      ?= 8

results: setup
	$(BIN)/python -m pip install --quiet --editable ".[peers]"
	$(BIN)/python -m usv.evaluate $(CKPTS) --clips $(CLIPS) --batch-size $(BATCH) --out data/results/usv_mini.json --videos outputs/results/students
	$(BIN)/python -m usv.peers $(CKPTS) --clips $(PEER_CLIPS) --batch-size $(BATCH) --out data/results/peers.json --videos outputs/results/peers
	$(BIN)/python -m usv_kernels.bench --seq 8192 32760
	cp outputs/results/students/contact_sheet.png docs/wan_mini.png
	$(MAKE) report

# the page, and the README's tables and plots, of the results that are there
PICTURES ?= --picture docs/pareto.svg=peers.json:subject_accuracy --picture docs/budgets.svg=budgets.json:subject_accuracy \
  --picture docs/budgets_psnr.svg=budgets.json:psnr

report: setup
	$(BIN)/python -m usv.report --videos outputs/results/peers --readme README.md $(PICTURES)

# The ablation: each axis alone, in pairs and all three, of one plan, that of the student that ships. Every row starts from its weights and has
# so many steps of velocity under its part of the plan, for few steps as many of trajectories from there, all with the dense one as guide.
# Quality of all in one run, then their times and what the axes make together. Two hours and a half on two cores, resumable.
START      ?= data/students/usv_mini
VELOCITY   ?= 200
TRAJECTORY ?= 150
PARTS      ?= folded:[]:steps attention:[density]:attention_steps merge:[merge]:merge_steps attention_merge:[density,merge]:all_three
ABLATED     = $(foreach part,$(PARTS),$(foreach name,$(firstword $(subst :, ,$(part))) $(lastword $(subst :, ,$(part))),--ckpt $(name)=outputs/ablation/$(name)/student))
TRAIN       = $(LAUNCH) train.py logger=none

ablation-students: setup data/shards/camera/index.json
	for part in $(PARTS); do IFS=: read -r name axes few <<< "$$part"; \
	  $(TRAIN) policy=inherit policy.axes=$$axes optim.steps=$(VELOCITY) objective.init=$(START) output_dir=outputs/ablation/$$name || exit 1; \
	  $(TRAIN) experiment=usv_few_step optim.steps=$(TRAJECTORY) objective.init=outputs/ablation/$$name/student \
	    objective.guide=outputs/ablation/folded/student objective.reuse=4 output_dir=outputs/ablation/$$few || exit 1; done

ablation: ablation-students
	$(BIN)/python -m usv.evaluate $(ABLATED) --clips 60 --batch-size $(BATCH) --out data/results/ablation.json
	$(BIN)/python -m usv.bench denoise $(ABLATED) --batch-size 4 --out data/results/ablation_times.json

# Quality against seconds over five budgets, a policy run each from the student that ships, and each axis alone beside them; an hour and a
# half after the ablation's students, resumable
BUDGETS ?= 0.15 0.2 0.28 0.4 0.6
SINGLE  ?= folded attention merge steps
BESIDE   = $(foreach budget,$(BUDGETS),--ckpt budget_$(budget)=outputs/budget_$(budget)/student) $(foreach name,$(SINGLE),--ckpt $(name)=outputs/ablation/$(name)/student)

budgets: ablation-students
	for budget in $(BUDGETS); do \
	  $(TRAIN) policy.budget=$$budget policy.most_density=1 policy.merge_layers=null optim.steps=$(VELOCITY) objective.init=$(START) \
	    output_dir=outputs/budget_$$budget || exit 1; done
	$(BIN)/python -m usv.evaluate $(BESIDE) --clips 60 --batch-size $(BATCH) --out data/results/budgets.json

kernels-report: setup
	$(BIN)/python -m usv_kernels.compile_report

bench-gpu: setup
	$(BIN)/python -m usv_kernels.bench --gpu
