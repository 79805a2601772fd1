"""What attention over depth is worth: experiments that are declared, run one by one, resumed, and drawn.

```sh
python -m attnres.training.experiments run retrofit --preset cpu --workers 2
python -m attnres.training.experiments report
```

`studies.py` declares the runs, `corpus.py` makes their text, `runner.py` does what is missing, `evidence.py` compares,
`scaling.py` fits power laws. Results are JSON files, one for each run, in `results/`.
"""
