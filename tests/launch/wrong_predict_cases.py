"""The table of wrong inputs to `launch.predict`."""

from __future__ import annotations

from tests.launch import wrong_inputs as wrong
from tests.launch.wrong_inputs import Case

ASK = "predict --workdir=run --prompt='caption en' --out=new.jsonl"
ASK_DATA = "predict --workdir=run --data=train.jsonl --out=new.jsonl"

PREDICT = {
    "nothing to predict with": Case(
        "predict --prompt=x --images 0.png", 2, r"give --workdir=RUN .* or --config=FILE.py"
    ),
    "both workdir and config": Case(
        ASK + " --config=config.py --images 0.png", 2, r"give --workdir=RUN .*not both"
    ),
    "nothing to answer": Case(
        "predict --workdir=run", 2, r"give what to answer: --data=FILE.jsonl, or --images"
    ),
    "no images": Case("predict --workdir=run --prompt=x", 2, r"give what to answer: .*--images a.jpg b.png"),
    "no prompt": Case("predict --workdir=run --images 0.png", 2, r"--images needs --prompt, such as"),
    "data and images": Case(ASK_DATA + " --prompt=x --images 0.png", 2, r"give what to answer: .*not both"),
    "empty batch": Case(
        ASK + " --batch_size=0 --images 0.png", 2, r"--batch_size=0: 0 is not a positive integer"
    ),
    "workdir that does not exist": Case(
        "predict --workdir=new --prompt=x --images 0.png",
        2,
        r"--workdir=new: expected the folder of a training run",
    ),
    "workdir that is no run": Case(
        "predict --workdir=. --prompt=x --images 0.png",
        2,
        r"--workdir=.: expected .* found no config.json in it. Name one",
    ),
    "run with a damaged config": Case(
        ASK + " --images 0.png",
        2,
        r"run/config.json: expected a run's config as JSON",
        wrong.cut_short("run/config.json"),
    ),
    "run that has not finished": Case(
        ASK + " --images 0.png",
        3,
        r"run/model.npz: no such file: the run has not finished.* or give --weights=",
        wrong.missing("run/model.npz"),
    ),
    "config that names no weights": Case(
        "predict --config=config.py --config.init= --prompt=x --images 0.png",
        2,
        r"config.init names no weights .*--weights=",
    ),
    "config of an unknown preset": Case(
        "predict --config=config.py --config.model.preset=tinny --prompt=x --images 0.png",
        2,
        r"Did you mean tiny\?",
    ),
    "weights to predict with missing": Case(
        ASK + " --weights=no.npz --images 0.png", 3, r"no.npz: no such file"
    ),
    "weights to predict with are none": Case(
        ASK + " --weights=train.jsonl --images 0.png", 3, r"train.jsonl: not a readable npz"
    ),
    "images missing": Case(
        ASK + " --images no.png 0.png nor.png", 3, r"--images: no such file: no.png, nor.png"
    ),
    "weights of another model to predict with": Case(
        "predict --config=config.py --config.model.preset=paligemma-3b-224 --prompt=x --images 0.png",
        3,
        r"weights.npz does not fit the model: .*It fits --config.model.preset=tiny\.",
    ),
    "folder without images": Case(
        ASK + " --images=run", 3, r"--images=run: no image in this folder: expected .*\.png"
    ),
    "prompt too long": Case(
        ASK + " --max_prompt_tokens=3 --images 0.png",
        2,
        r"--prompt: expected at most 3 tokens .*raise --max_prompt_tokens",
    ),
    "data missing": Case(
        "predict --workdir=run --data=no.jsonl --out=new.jsonl",
        3,
        r"/no.jsonl: expected a JSONL file, found nothing",
    ),
    "empty data": Case(
        ASK_DATA, 3, r"/train.jsonl: expected one JSON object a line", wrong.content("train.jsonl", "")
    ),
    "out in a missing folder": Case(
        "predict --workdir=run --data=train.jsonl --out=no/a.jsonl",
        2,
        r"--out=no/a.jsonl: there is no folder /.*/no; make it",
    ),
    "out is a folder": Case(
        "predict --workdir=run --data=train.jsonl --out=run",
        2,
        r"--out=run: expected a file to write, found a folder",
    ),
    "out is the data": Case(
        "predict --workdir=run --data=train.jsonl --out=run/../train.jsonl",
        2,
        r"is an input too, .*; name another file",
    ),
    "out that is somebody else's": Case(
        "predict --workdir=run --data=train.jsonl --out=answers.jsonl",
        2,
        r"--out=answers.jsonl: is there already, and no answers.jsonl.job.json .*name another file, or delete it",
    ),
}

SAMPLING = {
    "sampler that there is not": Case(
        ASK_DATA + " --sampler=gredy", 2, r"--sampler=gredy: value should be one of <greedy\|sample\|beam>"
    ),
    "more probability than there is": Case(
        ASK_DATA + " --sampler=sample --top_p=2", 2, r"--top_p=2.0: top_p=2.0: expected a probability above 0"
    ),
    "no temperature": Case(
        ASK_DATA + " --sampler=sample --temperature=0", 2, r"--temperature=0.0: .*for 0, choose greedy"
    ),
    "temperature of the greedy sampler": Case(
        ASK_DATA + " --temperature=0.5",
        2,
        r"--temperature=0.5 with config.eval.sampler=greedy: temperature, .* are for the sampler sample",
    ),
    "length penalty of samples": Case(
        ASK_DATA + " --sampler=sample --length_penalty=2", 2, r"length_penalty is for the sampler beam"
    ),
    "several likeliest answers": Case(
        ASK_DATA + " --n=2", 2, r"--n=2 with .*: 2 answers of the greedy sampler .*choose sample or beam"
    ),
    "more answers than candidates": Case(
        ASK_DATA + " --sampler=beam --n=3 --candidates=2", 2, r"--n=3 --candidates=2: 2 candidates for n=3"
    ),
    "no answer": Case(ASK_DATA + " --n=0", 2, r"--n=0 .*: n=0: expected at least one answer"),
    "seed below zero": Case(ASK_DATA + " --seed=-1", 2, r"--seed=-1 .*: seed=-1: expected 0 to 2\*\*32 - 1"),
    "tokens that are not there": Case(
        ASK_DATA + " --allow='<lok*>'",
        2,
        r"--allow=<lok\*>: expected a pattern of tokens, .*none of the 1344 is",
    ),
    "tokens for a program": Case(
        "predict --config=config.py --compile_only --ban='<seg*>'",
        2,
        r"--ban is about answers, of which --co",
    ),
    "allowed tokens banned": Case(
        ASK_DATA + " --allow='<loc*>' --ban='<loc*>'", 2, r"error: --allow and --ban leave no token to choose"
    ),
    "all tokens banned": Case(ASK_DATA + " --ban='*'", 2, r"--allow and --ban leave no token to choose"),
    "log-probabilities for nobody": Case(
        "predict --workdir=run --data=train.jsonl --logprobs", 2, r"--logprobs are written to --out="
    ),
    "report of nothing": Case(
        "predict --workdir=run --data=train.jsonl --report=a.html", 2, r"--report shows what is in --out="
    ),
    "report in a missing folder": Case(
        ASK_DATA + " --report=no/a.html", 2, r"--report=no/a.html: there is no folder /.*/no; make it"
    ),
    "report in place of a device": Case(
        ASK_DATA + " --report=/dev/null", 2, r"--report=/dev/null: expected a file.*found a device or a pipe"
    ),
    "report of a device": Case(
        "predict --workdir=run --data=train.jsonl --out=/dev/null --report=a.html",
        2,
        r"--out=/dev/null: expected a file, where a --report is wanted",
    ),
    "report in the answers": Case(
        ASK_DATA + " --report=new.jsonl", 2, r"--report=new.jsonl: is an input too"
    ),
    "choices for a sampler": Case(
        ASK_DATA + " --choices=yes,no --sampler=beam",
        2,
        r"--sampler: with choices no answer is written: leave this out",
    ),
    "no choice": Case(ASK_DATA + " --choices=", 2, r"--choices and --choices_field: expected texts"),
    "empty choice": Case(ASK_DATA + " --choices=yes,,no", 2, r"--choices=yes,,no: one of them is empty"),
    "choices of images in a field": Case(
        ASK + " --images 0.png --choices_field=choices", 2, r"--choices_field names a field of --data="
    ),
    "record without choices": Case(
        ASK_DATA + " --choices_field=choices",
        3,
        r"train.jsonl, line 1: field 'choices': expected a list of texts to choose from, found None",
    ),
}
