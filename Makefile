# The same commands as CI (.ci/run), for an environment that has requirements-dev.txt.
.PHONY: lint format test figures

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

test:
	python -m pytest

# The study's figures again, from its logs alone, into runs/figures/: compare with plots/logs/study-*/figures.
figures:
	python -m plots.figures --logs plots/logs/study-tiny --out runs/figures/tiny
	python -m plots.figures --logs plots/logs/study-smollm2 --out runs/figures/smollm2
	python -m plots.figures --logs plots/logs/study-hh --out runs/figures/hh
