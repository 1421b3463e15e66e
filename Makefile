## make demo       distil handwritten digits to one image a class, in minutes
## make test       the test suite, about 5 minutes on 2 cores; a test process with one thread on each core, up to 8
## make test-long  the long trials: kills at random moments, the demo's accuracy
## make bench      time and memory against the published way, about half an hour; BENCH="expert --rounds 1" for a part
## make clean      remove what the demo and the tests left
## Each makes .venv first where it is missing; PYTHON=python3.12 chooses another Python (3.11 or newer).
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-long bench clean

help:
	@sed -n 's/^## //p' Makefile

# The stamp is written last, so an interrupted installation is repeated and a finished one never is.
$(VENV)/installed: requirements.txt requirements_detail.txt
	@echo "Installing into $(VENV), which may take some minutes ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c requirements_detail.txt
	@touch $@

demo: $(VENV)/installed
	$(PY) buffer_ATT.py --dataset=Digits --model=ConvNetD2 --num_experts=4 --train_epochs=15 --batch_train=32 \
	    --lr_teacher=0.02 --buffer_path=demo/buffers --seed=0
	$(PY) distill_ATT.py --dataset=Digits --model=ConvNetD2 --ipc=1 --syn_steps=20 --expert_epochs=2 \
	    --max_start_epoch=5 --lr_img=100 --lr_lr=1e-5 --ema_decay=0.98 --Iteration=150 --eval_it=75 --num_eval=3 \
	    --epoch_eval_train=200 --buffer_path=demo/buffers --save_dir=demo/results --seed=0 --wandb=disabled

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -m "not long" --numprocesses auto --maxprocesses 8 \
	    --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/installed
	$(PY) -m pytest tests -m long

bench: $(VENV)/installed
	$(PY) benchmarks/bench.py $(BENCH)

clean:
	rm -rf demo .pytest_cache
