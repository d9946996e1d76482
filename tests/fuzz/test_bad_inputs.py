"""Over 300 bad inputs, over every verb and the start of a training run: each is refused in one
sentence that says what was expected and what was got. None is a traceback, a hang or a silent
acceptance, and no file is touched.

`make test` runs a sample of them, drawn with a seed, `make test-slow` all the others.
"""

import json
import os
import random
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.runs import TINY, TST, data

from megatron_tst import cli
from megatron_tst.checks import dry_run

FAST = 60  # of all cases
SECONDS = 40  # until a case counts as a hang
UNFORESEEN = "every mistake is foreseen"  # the sentence of cli/screen.py for any other exception


@dataclass
class Case:
    name: str
    argv: Callable[[Path], list]  # the folder of good files -> what the command gets
    spoil: Callable[[Path], None] = lambda here: None  # what is made bad in it before


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def hugging_face(folder: Path) -> None:
    """A released Llama: config.json, an index and two shards."""
    from safetensors.torch import save_file

    folder.mkdir()
    h, f = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    rows = {"model.embed_tokens": (64, h), "model.norm": (h,), "lm_head": (64, h)}
    for i in range(2):
        layer = f"model.layers.{i}"
        rows |= {
            f"{layer}.self_attn.q_proj": (32, h),
            f"{layer}.self_attn.k_proj": (16, h),
            f"{layer}.self_attn.v_proj": (16, h),
            f"{layer}.self_attn.o_proj": (h, 32),
            f"{layer}.mlp.gate_proj": (f, h),
            f"{layer}.mlp.up_proj": (f, h),
            f"{layer}.mlp.down_proj": (h, f),
            f"{layer}.input_layernorm": (h,),
            f"{layer}.post_attention_layernorm": (h,),
        }
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(s, generator=generator) for name, s in rows.items()}
    shards = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for i, (name, tensor) in enumerate(tensors.items()):
        list(shards.values())[i % 2][name] = tensor
    for file, held in shards.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    where = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 4}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="module")
def good(fork_server, corpus, tmp_path_factory):
    """A folder of good files: a checkpoint at the boundary and one after it, the corpus, a released
    model, a log, TensorBoard's events, text. Cases get a copy.
    """
    here = tmp_path_factory.mktemp("fuzz") / "good"
    here.mkdir()
    save = ["--save", here / "ck", "--save-interval", "6", "--tensorboard-dir", here / "events"]
    run = fork_server.train(*TINY, *TST, *data(corpus), *save)
    assert run.ok, run.log[-2000:]
    (here / "log").write_text(run.log)
    for path in corpus.parent.glob("text.*"):
        shutil.copy(path, here / path.name)
    hugging_face(here / "hf")
    (here / "texts").mkdir()
    for i in range(20):
        (here / "texts" / f"{i}.txt").write_text(f"text number {i}, with some words in it\n" * 20)
    return here


# What happens to files.
def emptied(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[: max(1, path.stat().st_size * 2 // 3)])


def noise(path):
    path.write_bytes(random.Random(path.name).randbytes(4000))


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def utf16(path):
    path.write_bytes(path.read_bytes().decode(errors="replace").encode("utf-16"))


def gone(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def a_loop(path):
    path.unlink()
    path.symlink_to(path.name)


def a_page(path):
    """What a proxy answers in a file's place."""
    path.write_text("<!DOCTYPE html><html><head><title>403 Forbidden</title></head></html>\n")


def a_pointer(path):
    """What git-lfs leaves where the file was not fetched."""
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22\n"
        "size 4976698672\n"
    )


def deep(path):
    path.write_text("[" * 100_000)


def a_list(path):
    path.write_text("[1, 2, 3]")


def a_number(path):
    path.write_text("1" * 5000)


def null(path):
    path.write_text("null")


BINARY = (emptied, cut, noise, zeros, gone, a_folder, a_pipe, a_loop, a_page, a_pointer)
JSON = (emptied, cut, noise, utf16, gone, a_folder, a_pipe, a_loop, a_page, deep, a_list, a_number)
JSON = (*JSON, null)


def set_key(*keys, value):
    """Changes one value in a JSON file."""

    def change(path):
        whole = inner = json.loads(path.read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(whole))

    return change


def bytes_at(place, content):
    def change(path):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(content)

    return change


def line(text):
    """A command; @ stands for the folder of the case."""
    return lambda here: [word.replace("@", str(here)) for word in text.split()]


PLAN = "--tst-bag-size 4 --tst-step-ratio 0.3 --train-iters 100"
IMPORT = line("import-hf @/hf @/target --layer-spec local")
EXPORT = line("export-hf @/ck @/target --tokenizer @/text.tokenizer.json")
PLAN_A_MODEL = line(f"plan --hf-config @/hf/config.json {PLAN}")
PLAN_A_CORPUS = line(f"plan {PLAN} --data-path @/text")
PLOT = line("plot --output @/target.png a=@/log")
CORPUS = line("corpus --output @/target --vocab-size 300 --input @/texts/1.txt @/texts/2.txt")
CHECKPOINT_VERBS = {
    "boundary": line("boundary @/ck @/target"),
    "export-hf": line("export-hf @/ck @/target"),
    "inspect": line("inspect @/ck"),
    "verify": line("verify @/ck @/ck"),
    "export-nemo": line("export-nemo @/ck @/target"),
}


def checkpoint_cases():
    last = "ck/iter_0000010"
    for verb, argv in CHECKPOINT_VERBS.items():
        for name, breakages in {
            "ck/latest_checkpointed_iteration.txt": (noise, a_folder, a_pipe, a_page, a_number),
            f"{last}/.metadata": BINARY,
            f"{last}/metadata.json": (emptied, cut, gone, a_page, deep, a_list),
        }.items():
            for breakage in breakages:
                yield verb, name, breakage, argv
        for breakage in (emptied, cut, gone, a_folder, a_pipe):
            if verb != "inspect":  # it reads no tensors
                yield verb, f"{last}/__0_0.distcp", breakage, argv


def file_cases():
    """Every file that a verb reads, broken in every way."""
    for verb, name, breakage, argv in checkpoint_cases():
        yield case_of(f"{verb}, {name.rpartition('/')[2]}", name, breakage, argv)
    for breakage in JSON:
        if breakage is not gone:
            yield case_of("import-hf, index", "hf/model.safetensors.index.json", breakage, IMPORT)
        yield case_of("import-hf, config", "hf/config.json", breakage, IMPORT)
        yield case_of("plan, config", "hf/config.json", breakage, PLAN_A_MODEL)
        yield case_of("export-hf, tokenizer", "text.tokenizer.json", breakage, EXPORT)
    for breakage in BINARY:
        shard = "hf/model-00002-of-00002.safetensors"
        yield case_of("import-hf, shard", shard, breakage, IMPORT)
    for breakage in BINARY:
        for suffix in (".idx", ".bin"):
            if (suffix, breakage) == (".bin", zeros):
                continue  # zeros are tokens
            yield case_of(f"plan, {suffix}", f"text{suffix}", breakage, PLAN_A_CORPUS)
    for breakage in (emptied, noise, zeros, gone, a_folder, a_pipe, a_loop, a_page, a_pointer):
        yield case_of("plot, log", "log", breakage, PLOT)
    for breakage in (gone, a_pipe, a_loop):
        yield case_of("corpus, input", "texts/1.txt", breakage, CORPUS)


def case_of(name, path, breakage, argv):
    how = breakage.__name__.replace("_", " ")
    return Case(f"{name}: {how}", argv, at(path, breakage))


def at(path, change):
    """Makes a change to a file in the folder of the case."""
    return lambda here: change(here / path)


BAD = {  # key of config.json: values that no model has
    "num_attention_heads": (0, -4, "four", 10**30, 3.5, [4], None),
    "num_hidden_layers": (0, -1, "2", 10**30, {}),
    "hidden_size": (0, -32, "32", 10**30, 32.5),
    "intermediate_size": (0, "wide", 10**30),
    "vocab_size": (0, -1, "64", 10**30, True),
    "num_key_value_heads": (0, 3, "2", -2),
    "head_dim": (0, -8, "8", 7.5),
    "rms_norm_eps": ("small", -1, [1e-5]),
    "rope_theta": (0, -1, "x"),
    "rope_scaling": ({"rope_type": "yarn", "factor": 4.0}, {"rope_type": "linear"}, 3, "linear"),
    "hidden_act": ("gelu", 3),
    "model_type": ("mistral", None, 7, ""),
    "tie_word_embeddings": ("no", 2),
    "max_position_embeddings": (0, "long", -5),
    "attention_bias": (True,),
}


def value_cases():
    """config.json of a model that cannot be."""
    for key, values in BAD.items():
        for value in values:
            change = set_key(key, value=value)
            name = f"import-hf, {key} = {json.dumps(value)[:30]}"
            yield Case(name, IMPORT, at("hf/config.json", change))
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        for value in BAD[key]:
            change = set_key(key, value=value)
            name = f"plan, {key} = {json.dumps(value)[:30]}"
            yield Case(name, PLAN_A_MODEL, at("hf/config.json", change))
    for name, place, content in (
        ("header of 2^63 bytes", 0, struct.pack("<Q", 2**63)),
        ("header of no bytes", 0, struct.pack("<Q", 0)),
        ("header cut", 0, struct.pack("<Q", 10)),
    ):
        change, shard = bytes_at(place, content), "hf/model-00001-of-00002.safetensors"
        yield Case(f"import-hf, safetensors: {name}", IMPORT, at(shard, change))
    for name, place, content in (
        ("magic", 0, b"MMIDIDY\x00\x00"),
        ("version", 9, struct.pack("<Q", 7)),
        ("dtype", 17, b"\x63"),
        ("number of sequences", 18, struct.pack("<Q", 2**60)),
        ("number of documents", 26, struct.pack("<Q", 3)),
        ("a length", 34, struct.pack("<i", -5)),
        ("a length that is not the pointers'", 34, struct.pack("<i", 7)),
    ):
        change = bytes_at(place, content)
        yield Case(f"plan, index: {name}", PLAN_A_CORPUS, at("text.idx", change))


NUMBERS = ("", "x", "0", "-1", "nan", "inf", "1e400", "1.5.2", str(10**30))
FLAGS = {  # of plan -> values that it cannot take
    "--num-layers": NUMBERS,
    "--hidden-size": NUMBERS,
    "--num-attention-heads": NUMBERS,
    "--vocab-size": NUMBERS,
    "--seq-length": NUMBERS,
    "--train-iters": NUMBERS,
    "--global-batch-size": NUMBERS,
    "--micro-batch-size": NUMBERS,
    "--gpus": NUMBERS,
    "--tokens": ("", "x", "0", "-1", "nan", "1e400", "5Q", "B"),
    "--mfu": ("", "x", "0", "-1", "nan", "inf", "1.2", "40%"),
    "--tflops": ("", "x", "0", "-1", "nan", "inf"),
    "--tensor-model-parallel-size": NUMBERS,
    "--pipeline-model-parallel-size": NUMBERS,
    "--tst-bag-size": ("", "x", "0", "-1", "nan", "1.5", str(10**23), "4,", "4,x"),
    "--tst-step-ratio": ("", "x", "-0.1", "1", "1.5", "nan", "inf"),
    "--tst-iters": ("", "x", "-1", "1.5", "100", str(10**30)),
    "--gpu": ("", "h1000", "tpu"),
    "--preset": ("", "4b", "3B "),
    "--hf-config": ("", "nowhere.json", "/dev/null", "/"),
    "--data-path": ("", "nowhere", "0.5 nowhere"),
}
SHAPE = {
    "--num-layers": 2,
    "--hidden-size": 64,
    "--num-attention-heads": 4,
    "--vocab-size": 1000,
    "--seq-length": 64,
    "--train-iters": 100,
    "--global-batch-size": 16,
    "--tst-bag-size": 4,
    "--tst-step-ratio": 0.3,
    "--gpus": 1,
}


def flag_cases():
    for flag, values in FLAGS.items():
        for value in values:
            given = {k: v for k, v in SHAPE.items() if flag != "--preset" or k.startswith("--tst")}
            if flag == "--tst-iters":
                del given["--tst-step-ratio"]
            words = [word for pair in (given | {flag: value}).items() for word in pair]
            yield Case(f"plan {flag} {value[:24]!r}", lambda here, words=words: ["plan", *words])
    for name, more in {
        "vocabulary 0": ["--vocab-size", "0"],
        "vocabulary -5": ["--vocab-size", "-5"],
        "vocabulary of 10 ids": ["--vocab-size", "10"],
        "vocabulary of 10^23 ids": ["--vocab-size", str(10**23)],
        "vocabulary x": ["--vocab-size", "x"],
        "seed x": ["--seed", "x"],
        "mistyped flag": ["--vocabsize", "300"],
    }.items():
        words = f"corpus --output @/target --input @/texts {' '.join(more)}"
        yield Case(f"corpus, {name}", line(words))
    for name, argv in {
        "corpus, an input that is not there": lambda h: [
            *("corpus", "--output", h / "target", "--input", h / "texts", h / "txets"),
            *("--vocab-size", "300"),
        ],
        "corpus, no prefix": lambda h: ["corpus", "--output", "", "--input", h / "texts"],
        "corpus, a file in the folder's place": lambda h: [
            *("corpus", "--output", h / "log" / "x", "--input", h / "texts", "--vocab-size", "300")
        ],
        "boundary, no checkpoint": lambda h: ["boundary", h / "texts", h / "target"],
        "boundary, a file for a checkpoint": lambda h: ["boundary", h / "log", h / "target"],
        "boundary, target is there": lambda h: ["boundary", h / "ck", h / "texts"],
        "boundary, target in a file": lambda h: ["boundary", h / "ck", h / "log" / "x"],
        "boundary, target is the source": lambda h: ["boundary", h / "ck", h / "ck", "--force"],
        "boundary, target in the source": lambda h: ["boundary", h / "ck", h / "ck" / "new"],
        "boundary, reinit of nothing": lambda h: [
            *("boundary", h / "ck", h / "target", "--reinit", "hed")
        ],
        "boundary, spec": lambda h: ["boundary", h / "ck", h / "target", "--layer-spec", "te"],
        "boundary, empty names": lambda h: ["boundary", "", ""],
        "export-hf, target is the source": lambda h: ["export-hf", h / "ck", h / "ck", "--force"],
        "export-hf, vocabulary": lambda h: [
            *("export-hf", h / "ck", h / "target", "--vocab-size", str(10**9))
        ],
        "export-hf, tokenizer": lambda h: [
            *("export-hf", h / "ck", h / "target", "--tokenizer", h / "nowhere")
        ],
        "export-hf, dtype": lambda h: ["export-hf", h / "ck", h / "target", "--dtype", "int8"],
        "import-hf, target is the source": lambda h: ["import-hf", h / "hf", h / "hf", "--force"],
        "import-hf, target holds the source": lambda h: ["import-hf", h / "hf", h, "--force"],
        "import-hf, a checkpoint": lambda h: ["import-hf", h / "ck", h / "target"],
        "verify, one is no checkpoint": lambda h: ["verify", h / "ck", h / "hf"],
        "inspect, nothing": lambda h: ["inspect", h / "nowhere"],
        "plot, one name twice": lambda h: [
            *("plot", "--output", h / "target.png", f"a={h}/log", f"a={h}/log")
        ],
        "plot, another format": lambda h: ["plot", "--output", h / "target.pdf", f"a={h}/log"],
        "plot, picture in a file": lambda h: ["plot", "--output", h / "log/x.png", f"a={h}/log"],
        "plot, no run": lambda h: ["plot", "--output", h / "target.png"],
        "plot, parameters": lambda h: [
            *("plot", "--output", h / "target.png", "--parameters", "-1", f"a={h}/log")
        ],
        "demo, iterations 0": lambda h: ["demo", "--out", h / "target", "--iterations", "0"],
        "demo, iterations -1": lambda h: ["demo", "--out", h / "target", "--iterations", "-1"],
        "demo, iterations x": lambda h: ["demo", "--out", h / "target", "--iterations", "x"],
        "quantize, recipe": lambda h: ["quantize", h / "ck", h / "target", "--recipe", "int3"],
        "launch, no script": lambda h: ["launch"],
        "no such verb": lambda h: ["bondary", h / "ck", h / "target"],
    }.items():
        yield Case(name, argv)


TRAINING = {  # what the start of a training run is given beside the tiny model
    "bag size 0": ["--tst-bag-size", "0", "--tst-iters", "6"],
    "bag size 10^23": ["--tst-bag-size", str(10**23), "--tst-iters", "6"],
    "bag size x": ["--tst-bag-size", "x", "--tst-iters", "6"],
    "bag size 1.5": ["--tst-bag-size", "1.5", "--tst-iters", "6"],
    "bag size empty": ["--tst-bag-size", "", "--tst-iters", "6"],
    "no length": ["--tst-bag-size", "4"],
    "length alone": ["--tst-iters", "6"],
    "ratio alone": ["--tst-step-ratio", "0.3"],
    "loss alone": ["--tst-loss", "bce"],
    "kernel alone": ["--tst-kernel", "torch"],
    "exit alone": ["--tst-exit-at-boundary"],
    "both lengths": [*TST, "--tst-step-ratio", "0.3"],
    "ratio 1": ["--tst-bag-size", "4", "--tst-step-ratio", "1"],
    "ratio nan": ["--tst-bag-size", "4", "--tst-step-ratio", "nan"],
    "length of all": ["--tst-bag-size", "4", "--tst-iters", "10"],
    "length negative": ["--tst-bag-size", "4", "--tst-iters", "-3"],
    "unknown loss": [*TST, "--tst-loss", "mse"],
    "unknown switch": [*TST, "--tst-switch", "sometimes"],
    "slope 0": [*TST, "--tst-switch", "auto", "--tst-switch-slope", "0"],
    "slope without auto": [*TST, "--tst-switch-slope", "0.1"],
    "window 0.5": [*TST, "--tst-switch", "auto", "--tst-switch-window", "0.5"],
    "mistyped": [*TST, "--tst-bag-sise", "4"],
    "mistyped, of Megatron": [*TST, "--num-layer-s", "4"],
    "exit without --save": [*TST, "--tst-exit-at-boundary"],
    "iterations 0": [*TST, "--train-iters", "0"],
    "sequence length 0": [*TST, "--seq-length", "0"],
    "micro-batch 0": [*TST, "--micro-batch-size", "0"],
    "tensor parallelism 0": [*TST, "--tensor-model-parallel-size", "0"],
    "batch 0": [*TST, "--global-batch-size", "0"],
    "batch that no micro-batches fill": [*TST, "--global-batch-size", "3"],
    "positions": [*TST, "--reset-position-ids"],
    "cyclic": [*TST, "--dataloader-type", "cyclic"],
    "ramp-up": [*TST, "--rampup-batch-size", "2", "2", "8"],
    "bag sizes and lengths": ["--tst-bag-size", "4", "2", "--tst-iters", "6"],
    "lengths and bag sizes": ["--tst-bag-size", "4", "--tst-iters", "2", "2"],
}

CASES = [*file_cases(), *value_cases(), *flag_cases()]
SAMPLE = set(random.Random(17).sample(range(len(CASES)), FAST))
PARAMETERS = [
    pytest.param(case, id=case.name, marks=[] if i in SAMPLE else [pytest.mark.slow])
    for i, case in enumerate(CASES)
]


def test_there_are_over_300():
    names = [case.name for case in CASES]
    assert len(names) + len(TRAINING) > 300 and len(set(names)) == len(names)


@dataclass
class Answer:
    code: int
    out: str
    err: str


def answer_of(main: Callable[[], int], folder: Path) -> Answer:
    """What `main` prints and returns, in a fork: the alarm kills what hangs, in any system call."""
    process = os.fork()
    if process == 0:
        code = 99
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout has one
            signal.alarm(SECONDS)
            code = main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code != -signal.SIGALRM, f"no answer in {SECONDS} seconds"
    return Answer(code, (folder / "out").read_text(), (folder / "err").read_text())


def held(folder: Path) -> dict:
    """Everything that is in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        regular = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.read_bytes() if regular else None
    return found


def assert_clear(said: str) -> None:
    """One sentence, with what was expected and what was got."""
    lines = said.splitlines()
    errors = [line for line in lines if ": error: " in line or line.startswith("dry run: REFUSED")]
    assert len(errors) == 1 and errors[0] == lines[-1], said
    assert "Traceback" not in said and UNFORESEEN not in said, said
    assert "expected" in errors[0] or "argument" in errors[0] or "invalid" in errors[0], said
    assert len(errors[0]) < 1000, said


@pytest.mark.parametrize("case", PARAMETERS)
def test_refused_in_one_sentence(case, good, tmp_path, monkeypatch):
    here, screen = tmp_path / "here", tmp_path / "screen"
    shutil.copytree(good, here, symlinks=True)
    screen.mkdir()
    monkeypatch.chdir(tmp_path)
    case.spoil(here)
    before, around = held(here), set(os.listdir(tmp_path))
    said = answer_of(lambda: cli.main(list(map(str, case.argv(here)))), screen)
    assert said.code == 2, f"exit code {said.code}: {said.out[-1500:]}{said.err[-1500:]}"
    assert_clear(said.err)
    assert held(here) == before, "files were touched"
    assert set(os.listdir(tmp_path)) == around, "something was left behind"


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_run_is_refused_in_one_sentence(name, corpus, tmp_path):
    flags = ["--world-size", 1, "--gpu", "h100", "--", *TINY, *data(corpus), *TRAINING[name]]
    said = answer_of(lambda: dry_run.main(list(map(str, flags))), tmp_path)
    assert said.code == 2, said.out[-1500:] + said.err[-1500:]
    assert_clear(said.err)
