"""The table of wrong inputs: what is typed, what has been spoiled, what is said, and the exit code."""

from __future__ import annotations

import importlib.util
import json

from tests.launch import wrong_inputs as wrong
from tests.launch.wrong_inputs import Case
from tests.launch.wrong_predict_cases import PREDICT, SAMPLING

TRAIN = "train --config=config.py --workdir=new"
AGAIN = "train --config=config.py --workdir=run"
JOB = TRAIN + " --coordinator=localhost:1234"
COMPILE = "train --config=config.py --compile_only"

COMMAND_LINE = {
    "no config": Case("train --workdir=new", 2, r"--config must be given"),
    "no workdir": Case("train --config=config.py", 2, r"--workdir must be given"),
    "misspelt flag": Case(
        "train --config=config.py --wrokdir=new", 2, r"--wrokdir; did you mean --workdir\?"
    ),
    "argument without a flag": Case(
        TRAIN + " new", 2, r"unexpected argument 'new'; values are given as --flag="
    ),
    "misspelt field": Case(
        TRAIN + " --config.optimizer.learningrate=1",
        2,
        r"config.optimizer.learningrate: config.py has no such .* mean --config.optimizer.learning_rate\?",
    ),
    "text for a number": Case(
        TRAIN + " --config.steps=ten", 2, r"--config.steps: expected a whole number, found 'ten'"
    ),
    "half a step": Case(
        TRAIN + " --config.steps=1.5", 2, r"--config.steps: expected a whole number, found '1.5'"
    ),
    "profile without numbers": Case(
        TRAIN + " --profile=abc", 2, r"--profile=abc: expected STEP:COUNT.*such as 10:3"
    ),
    "profile of no step": Case(TRAIN + " --profile=3:0", 2, r"--profile=3:0: .*whole numbers of at least 1"),
    "profile beyond the end": Case(
        TRAIN + " --profile=10000:1", 2, r"--profile=10000:1: .*found step 10000 of \d+ \(config.steps\)"
    ),
    "profile of what does not run": Case(
        "train --config=config.py --compile_only --profile=3:2", 2, r"--profile is for steps that run"
    ),
    "no devices": Case(TRAIN + " --fake_devices=0", 2, r"--fake_devices=0: 0 is not a positive integer"),
    "coordinator without port": Case(
        TRAIN + " --coordinator=localhost --num_processes=2 --process_id=0",
        2,
        r"--coordinator: expected HOST:PORT, such as .*, found 'localhost'",
    ),
    "port that is none": Case(
        TRAIN + " --coordinator=localhost:99999 --num_processes=2 --process_id=0",
        2,
        r"found 'localhost:99999'",
    ),
    "process id out of range": Case(
        JOB + " --num_processes=2 --process_id=2", 2, r"--process_id: expected 0 to 1 .*, found 2"
    ),
    "process id below zero": Case(
        JOB + " --num_processes=2 --process_id=-1", 2, r"--process_id=-1: -1 is not"
    ),
    "coordinator alone": Case(
        JOB, 2, r"--num_processes and --process_id missing: a job of several processes needs"
    ),
    "process id missing": Case(
        JOB + " --num_processes=2", 2, r"--process_id missing: .* --process_id=0..N-1"
    ),
    "workdir is a file": Case(
        "train --config=config.py --workdir=0.png",
        2,
        r"--workdir=0.png: expected a folder .*/0.png is a file. Name",
    ),
    "workdir inside a file": Case(
        "train --config=config.py --workdir=0.png/new",
        2,
        r"--workdir=0.png/new: expected a folder .*/0.png is a file",
    ),
    "workdir is a URL": Case(
        "train --config=config.py --workdir=s3://b/new", 2, r"s3://b/new: expected a local folder or gs://"
    ),
}

COMPILE_ONLY = {
    "compile without a config": Case("train --compile_only", 2, r"--config must be given"),
    "decoding to compile without a config": Case(
        "predict --compile_only", 2, r"give --workdir=RUN or --config=FILE.py"
    ),
    "answers of what is only compiled": Case(
        "predict --config=config.py --compile_only --out=new.jsonl",
        2,
        r"--out: --compile_only answers nothing",
    ),
    "topology for decoding without compile_only": Case(
        "predict --config=config.py --topology=v5e:4x4",
        2,
        r"--topology, --slices and --dump are for --compile_only",
    ),
    "topology without compile_only": Case(
        TRAIN + " --topology=v5e:4x4", 2, r"--topology, --slices and --dump are for --compile_only"
    ),
    "slices without compile_only": Case(
        TRAIN + " --slices=2", 2, r"--topology, --slices and --dump are for --compile_only"
    ),
    "slices of no topology": Case(COMPILE + " --slices=2", 2, r"--slices is for --topology"),
    "topology without a shape": Case(
        COMPILE + " --topology=v5e", 2, r"--topology=v5e: expected a kind of TPU .* such as v5e:4x4"
    ),
    "topology of four axes": Case(
        COMPILE + " --topology=v4:2x2x2x2", 2, r"expected a kind of TPU and its chips along each axis"
    ),
    "batch that the devices do not divide": Case(
        COMPILE + " --fake_devices=3",
        2,
        r"config.batch_size=4 cannot be split evenly over the 3 devices of the mesh: use a multiple of 3",
    ),
    "mesh of more devices than there are": Case(
        COMPILE + " --config.mesh.data=2", 2, r"config.mesh: data=2 x fsdp=-1 does not fit 1 device"
    ),
    "dump into a file": Case(
        COMPILE + " --dump=0.png/step", 2, r"--dump=0.png/step: cannot write there: Not a directory"
    ),
    "wrong field to compile with": Case(
        COMPILE + " --config.batch_size=0", 2, r"config.batch_size: expected at least 1, found 0"
    ),
}

if importlib.util.find_spec("libtpu") is None:
    COMPILE_ONLY["compiler for TPUs missing"] = Case(
        COMPILE + " --topology=v5e:4x4",
        2,
        r"the compiler for TPUs is not installed.*pip install 'pgdist\[plan\]'",
    )

CONFIG = {
    "config file missing": Case(
        "train --config=nowhere.py --workdir=new", 2, r"config file nowhere.py: No such file or directory"
    ),
    "config file is a folder": Case(
        "train --config=run --workdir=new", 2, r"config file run: Is a directory"
    ),
    "syntax error": Case(
        TRAIN, 2, r"config.py line 2: invalid syntax", wrong.content("config.py", "\ndef get_config(:\n")
    ),
    "no get_config": Case(
        TRAIN, 2, r"config.py defines no function get_config\(\)", wrong.content("config.py", "x = 1")
    ),
    "config that is no ConfigDict": Case(
        TRAIN,
        2,
        r"config.py: get_config\(\) returns dict, expected a ConfigDict",
        wrong.content("config.py", "def get_config():\n    return {}"),
    ),
    "config file sets an unknown field": Case(
        TRAIN,
        2,
        r"config.py line 15: the config has no field 'wokers'; did you mean 'workers'\?$",
        wrong.config_line("c.data.wokers = 2"),
    ),
    "config file sets another type": Case(
        TRAIN,
        2,
        r"config.py line 15: field 'steps': expected a whole number, found ten \(str\)$",
        wrong.config_line("c.steps = 'ten'"),
    ),
    "config file sets None": Case(
        TRAIN, 2, r"config.steps: expected a whole number, found None", wrong.config_line("c.steps = None")
    ),
    "config without most fields": Case(
        TRAIN,
        2,
        r"config.batch_size is missing: .* start from pgdist.config.default_config\(\)",
        wrong.content(
            "config.py",
            "import ml_collections as m\ndef get_config():\n    return m.ConfigDict({'steps': 1})",
        ),
    ),
    "config with a field too many": Case(
        TRAIN,
        2,
        r"config.stpes: there is no such field. Did you mean steps\?",
        wrong.config_line("c = c.unlock().copy_and_resolve_references(); c.stpes = 1"),
    ),
    "negative steps": Case(
        TRAIN + " --config.steps=-1", 2, r"config.steps: expected at least 1, found -1. Set it with"
    ),
    "learning rate that is no number": Case(
        TRAIN + " --config.optimizer.learning_rate=nan",
        2,
        r"learning_rate: expected a finite number, 0 or more, found nan",
    ),
    "negative seed": Case(
        TRAIN + " --config.seed=-1", 2, r"config.seed: expected 0 to 2\*\*32 - 1, found -1"
    ),
    "unknown preset": Case(
        TRAIN + " --config.model.preset=paligema2-3b-224",
        2,
        r"config.model.preset: .* found 'paligema2-3b-224'. Did you mean paligemma2-3b-224\?",
    ),
    "unknown optimizer": Case(
        TRAIN + " --config.optimizer.name=adam",
        2,
        r"config.optimizer.name: .* found 'adam'. Did you mean adamw\?",
    ),
    "unknown schedule": Case(
        TRAIN + " --config.schedule.name=cosin",
        2,
        r"config.schedule.name: .* found 'cosin'. Did you mean cosine\?",
    ),
    "unknown metric": Case(
        TRAIN + " --config.eval.metric=exactmatch",
        2,
        r"config.eval.metric='exactmatch' .* mean 'exact_match'\?",
    ),
    "unknown sampler": Case(
        TRAIN + " --config.eval.sampler=beem",
        2,
        r"config.eval.sampler: expected one of greedy, sample, beam; found 'beem'. Did you mean beam\?",
    ),
    "probability above 1": Case(
        TRAIN + " --config.eval.sampler=sample --config.eval.top_p=2",
        2,
        r"config.eval: top_p=2.0: expected a probability",
    ),
    "setting of another sampler": Case(
        TRAIN + " --config.eval.temperature=0.5",
        2,
        r"config.eval: temperature, top_k and top_p are for the sampler sample, not greedy",
    ),
    "unknown dtype": Case(
        TRAIN + " --config.frozen_dtype=fp16",
        2,
        r"config.frozen_dtype: expected one of float32, .*; found 'fp16'",
    ),
    "batch that does not divide": Case(
        TRAIN + " --fake_devices=3",
        2,
        r"config.batch_size=4 cannot be split .* over the 3 devices .*multiple of 3",
    ),
    "mesh larger than the devices": Case(
        TRAIN + " --fake_devices=2 --config.mesh.data=4 --config.mesh.fsdp=1",
        2,
        r"config.mesh: data=4 x fsdp=1 does not fit 2 device\(s\): their product must be 2. Set one",
    ),
    "rule that matches nothing": Case(
        TRAIN + " --config.trainable=\"(('llm/layers/attention/.*', 1.0), ('.*', 0.0))\"",
        2,
        r"rule 'llm/layers/attention/.\*' matches no parameter.*\n  llm/layers/attn/q_einsum/w\n",
    ),
    "parameters without a rule": Case(
        TRAIN + " --config.trainable=\"(('llm/.*', 1.0),)\"",
        2,
        r"no rule covers img/.*\n  and \d+ more\nEnd the rules with \(\"\.\*\", 0\.0\)",
    ),
    "rule that is no regex": Case(
        TRAIN + " --config.trainable=\"(('llm/(.*', 1.0), ('.*', 0.0))\"",
        2,
        r"config.trainable\[0\]: 'llm/\(.\*' is not a regular expression: missing \)",
    ),
    "rule that is no pair": Case(
        TRAIN + " --config.trainable=\"('.*', 1.0)\"",
        2,
        r"trainable\[0\]: expected \(regex, learning-rate scale\), found",
    ),
    "everything frozen": Case(
        TRAIN + " --config.trainable=\"(('.*', 0.0),)\"",
        2,
        r"freezes every parameter: give at least one rule a scale",
    ),
    "workdir of another config": Case(
        AGAIN + " --config.steps=9",
        2,
        r"--workdir=run holds another run .*\n  config.steps: 2 -> 9\nUse a new .* or --fork",
    ),
    "damaged config in the workdir": Case(
        AGAIN,
        2,
        r"run/config.json: expected a run's config as JSON, found: .*line 1 column \d+.*Mend it",
        wrong.cut_short("run/config.json"),
    ),
    "config in the workdir is a list": Case(
        AGAIN, 2, r"run/config.json: .* found: it holds a list", wrong.content("run/config.json", "[1]")
    ),
}

DATA = {
    "training file not named": Case(
        TRAIN + " --config.data.train=", 2, r"config.data.train: expected a path, found ''"
    ),
    "training file missing": Case(
        TRAIN + " --config.data.train=nowhere.jsonl",
        3,
        r"/nowhere.jsonl: expected a JSONL file, found nothing",
    ),
    "folder for a training file": Case(
        TRAIN + " --config.data.train=run", 3, r"/run: expected a JSONL file, found a dir"
    ),
    "validation file missing": Case(
        TRAIN + " --config.data.validation=no.jsonl", 3, r"/no.jsonl: .* found nothing"
    ),
    "empty JSONL": Case(
        TRAIN,
        3,
        r"/train.jsonl: expected one JSON object a line, found no line .* \(0 bytes\)",
        wrong.content("train.jsonl", ""),
    ),
    "JSON over several lines": Case(
        TRAIN,
        3,
        r"5 of 5 examples .*/train.jsonl, line 1: a \[ alone: is this JSON over several lines\? Give each",
        wrong.content("train.jsonl", json.dumps([{"image": "0.png"}], indent=2)),
    ),
    "packed JSONL": Case(
        TRAIN,
        3,
        r"/train.jsonl: .* found a gzip file: unpack it",
        wrong.content("train.jsonl", b"\x1f\x8b\b"),
    ),
    "broken JSON": Case(
        TRAIN,
        3,
        r"1 of 8 .*max_bad_share.*/train.jsonl, line 3: column 11: broken JSON: Unterminated string$",
        wrong.line(3, '{"image": "2.png'),
    ),
    "no suffix": Case(
        TRAIN,
        3,
        r"/train.jsonl, line 3: no field 'suffix' \(fields found: image, prefix\)",
        wrong.line(3, wrong.example(image="2.png", suffix=None)),
    ),
    "no prefix": Case(
        TRAIN,
        3,
        r"/train.jsonl, line 1: no field 'prefix' .*one prefix for all: config.data.prefix",
        wrong.line(1, wrong.example(image="0.png", prefix=None)),
    ),
    "suffix that is no text": Case(
        TRAIN,
        3,
        r"/train.jsonl, line 8: field 'suffix': expected text, found a number: 3",
        wrong.line(8, wrong.example(image="7.png", suffix=3)),
    ),
    "not UTF-8": Case(
        TRAIN,
        3,
        r"/train.jsonl, line 3: column 40: not UTF-8 \(byte 0xe9\)",
        wrong.line(3, wrong.example(image="2.png", suffix="caf@").encode().replace(b"@", b"\xe9")),
    ),
    "tokenizer not named": Case(
        TRAIN + " --config.tokenizer=", 2, r"config.tokenizer: expected a path, found ''"
    ),
    "tokenizer missing": Case(
        TRAIN + " --config.tokenizer=no.model",
        2,
        r"tokenizer 'no.model': expected a SentencePiece model .* found nothing",
    ),
    "tokenizer that is none": Case(
        TRAIN,
        2,
        r"tokenizer 'tokenizer.model': not a SentencePiece model \(6 bytes\); give the tokenizer.model",
        wrong.content("tokenizer.model", "<html>"),
    ),
    "tokenizer of another model": Case(
        TRAIN,
        2,
        r"config.tokenizer=tokenizer.model has \d+ tokens, config.model.preset=tiny embeds \d+: .*Give",
        wrong.tokenizer_too_large,
    ),
}

WEIGHTS = {
    "weights missing": Case(TRAIN + " --config.init=no.npz", 3, r"no.npz: no such file"),
    "folder for weights": Case(
        TRAIN + " --config.init=run", 3, r"run: is a folder; name the .npz .* It holds model.npz"
    ),
    "weights cut short": Case(
        TRAIN, 3, r"weights.npz: .* cut short. Download or copy it again", wrong.cut_short("weights.npz")
    ),
    "weights that are no zip": Case(
        TRAIN, 3, r"weights.npz: not a readable npz: .* a zip archive", wrong.content("weights.npz", "hello")
    ),
    "NaN in weights": Case(
        TRAIN,
        3,
        r"weights.npz: array 'llm/final_norm/scale' holds NaN or infinity.*use another",
        wrong.number_in_weights(float("nan")),
    ),
    "infinity in weights": Case(
        TRAIN,
        3,
        r"weights.npz: array 'llm/final_norm/scale' holds NaN or infinity.*use another",
        wrong.number_in_weights(float("-inf")),
    ),
    "number too large for float16": Case(
        TRAIN + " --config.frozen_dtype=float16",
        3,
        r"weights.npz: array 'llm/final_norm/scale' .* too large for float16.*Use bfloat16",
        wrong.number_in_weights(1e6),
    ),
    "pickled objects in weights": Case(
        TRAIN,
        3,
        r"weights.npz: array 'llm/final_norm/scale' holds Python objects, which are never unpickled",
        wrong.pickled_array_in_weights,
    ),
    "array missing in weights": Case(
        TRAIN,
        3,
        r"weights.npz does not fit the model: .*\n  - img/head/bias .* expected by the model",
        wrong.array_missing_in_weights,
    ),
    "weights of another preset": Case(
        TRAIN + " --config.model.preset=paligemma-3b-224",
        3,
        r"weights.npz does not fit the model: .*It fits --config.model.preset=tiny\.",
    ),
}

CASES = COMMAND_LINE | COMPILE_ONLY | CONFIG | DATA | WEIGHTS | PREDICT | SAMPLING
