"""How often each corpus is read: what the checks say against what Megatron's own dataset gives out,
token by token; and text that does not suffice.
"""

import argparse
import contextlib
import dataclasses
import math
import types
import warnings

import numpy as np
import pytest

from megatron_tst.checks import text
from megatron_tst.checks.blends import read_blends, training_blend
from megatron_tst.config import TSTConfig
from megatron_tst.data.dataset import phased_provider
from megatron_tst.errors import TSTError
from megatron_tst.loop.run import Run
from megatron_tst.schedule import Schedule

L, BATCH = 8, 2
SIZES = {"a": 3000, "b": 900, "small": 30, "tiny": 12}  # tokens; small is one bag sample of 3 * 8
IDS = 100  # each corpus has its own: corpus i has i * IDS and up


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder, draw = tmp_path_factory.mktemp("corpora"), np.random.default_rng(0)
    for i, (name, tokens) in enumerate(SIZES.items()):
        builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        while tokens:
            length = min(tokens, int(draw.integers(5, 15)))
            builder.add_document(draw.integers(i * IDS, (i + 1) * IDS, length), [length])
            tokens -= length
        builder.finalize(str(folder / f"{name}.idx"))
    return folder


def arguments(folder, **given):
    """Megatron's data arguments; a word that is a corpus becomes its prefix."""
    names = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    files = ("data_args_path", "per_split_data_args_path", "split")
    args = argparse.Namespace(**dict.fromkeys((*names, *files)), **dict(seq_length=L, rank=0))
    args.create_attention_mask_in_dataloader, args.padded_vocab_size = False, 512
    args.global_batch_size, args.full_validation, args.multiple_validation_sets = BATCH, None, None
    args.consumed_train_samples = 0
    for name, value in given.items():
        if name in names:
            words = value.split()
            value = [str(folder / word) if word in SIZES else word for word in words]
        setattr(args, name, value)
    return args


def plan(config, iterations=12):
    run = argparse.Namespace(
        train_iters=iterations, train_samples=None, global_batch_size=BATCH, seq_length=L
    )
    return config.schedule(run)


def provider(args):
    """As a script's, over Megatron's own builder."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    def build(sizes):
        blend, per_split = read_blends(args)
        masks = "reset_position_ids", "reset_attention_mask", "eod_mask_loss"
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=args.seq_length,
            blend=blend,
            blend_per_split=per_split,
            split=args.split,
            full_validation=args.full_validation,
            multiple_validation_sets=args.multiple_validation_sets,
            tokenizer=NullTokenizer(512),
            create_attention_mask=False,
            **dict.fromkeys(masks, False),
        )
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()

    return build


@contextlib.contextmanager
def built(args, config, schedule, valid=4):
    """(training, validation, test) as a run of TST gets them."""
    from megatron_tst.loop import patch, seams

    run = types.SimpleNamespace(training_alone=False)
    patch.install({seams.BUILDER: Run.dataset_builder.__get__(run)})
    alone = Run.build_training_alone.__get__(run)
    wrapped = phased_provider(
        provider(args), args, config, lambda: schedule, lambda *pair: None, alone
    )
    try:
        yield wrapped([schedule.train_samples, valid, 4])
    finally:
        patch.remove()


def found(args, config, schedule):
    training = training_blend(args, *read_blends(args))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return text.check_text(config, text.count(*training), schedule)


MANY = TSTConfig(3, iters=6, max_epochs=99)


@pytest.mark.parametrize(
    "given, config",
    [
        (dict(data_path="a", split="100,0,0"), MANY),
        (dict(data_path="a", split="50,40,10"), MANY),
        (dict(data_path="b", split="90,10,0"), TSTConfig(3, iters=11, max_epochs=99)),
        (dict(data_path="a b", split="100,0,0"), MANY),
        (dict(data_path="3 a 1 b", split="90,10,0"), MANY),
        (dict(data_path="1 a 1 small", split="100,0,0"), MANY),
        (dict(data_path="0.2 a 0.8 tiny", split="100,0,0"), MANY),
        (dict(train_data_path="b", valid_data_path="a"), MANY),
        (dict(train_data_path="2 a 1 b", valid_data_path="tiny", test_data_path="small"), MANY),
        (dict(data_path="1 a 1 b", split="100,0,0"), TSTConfig((4, 2), iters=(3, 3))),
        (dict(data_path="b", split="100,0,0"), TSTConfig(3, iters=6, superpose="output")),
    ],
)
def test_each_corpus_is_read_as_often_as_is_said(megatron, corpora, given, config):
    args, schedule = arguments(corpora, **given), plan(config)
    readings = found(args, config, schedule)
    with built(args, config, schedule) as (train, _, _):
        read = np.zeros(len(SIZES), dtype=int)
        for i in range(len(train)):
            ids = np.asarray(train[i]["tokens"]).ravel() // IDS
            read += np.bincount(ids, minlength=len(SIZES))
    assert sum(read) == schedule.raw_tokens(schedule.train_samples)
    places = list(SIZES)
    for reading in readings:
        name = reading.corpus.prefix.rpartition("/")[2]
        share = 1.0 if not args.split else float(args.split.split(",")[0]) / 100
        assert reading.corpus.tokens == pytest.approx(share * SIZES[name], abs=20)
        # Megatron's blends are off by a sample or two of each corpus
        close = 1e-9 if len(readings) == 1 else 2 * schedule.long_sample_length
        assert reading.tokens == pytest.approx(read[places.index(name)], abs=close)
        assert reading.times == reading.tokens / reading.corpus.tokens
    assert sum(r.tokens for r in readings) == pytest.approx(sum(read))


def test_what_was_counted_stays_as_it_is():
    corpus = text.Corpus("a", 40)
    for one, name in ((corpus, "tokens"), (text.Reading(corpus, (1.0,)), "by_phase")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, name, 0)


def test_the_line_says_each_phase():
    schedule = Schedule.of(4, 2, train_samples=4, seq_length=8, global_batch_size=1)
    corpora = [text.Corpus("a", 40, 3.0), text.Corpus("b", 1000, 1.0)]
    assert text.said(text.readings(corpora, schedule), schedule) == (
        "a is read 1.50 times (60 tokens of 40): 1.20 in bag size 4, 0.30 in recovery | "
        "b is read 0.02 times (20 tokens of 1,000): 0.016 in bag size 4, 0.004 in recovery"
    )


@pytest.mark.parametrize("times, shown", [(4, "4.00"), (0.1, "0.10"), (0.0994, "0.099")])
def test_digits_of_how_often(times, shown):
    assert text._times(times) == shown


def check(tokens, config, schedule=None, weights=None):
    corpora = [
        text.Corpus(name, count, weights and weights[i])
        for i, (name, count) in enumerate(zip("ab", tokens))
    ]
    return text.check_text(config, corpora, schedule or plan(config))


def test_text_that_is_read_more_than_once_is_warned_of_and_more_than_allowed_refused():
    config, needed = TSTConfig(3, iters=6), 6 * BATCH * L * 3 + 6 * BATCH * L
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check([needed], config)
        check([needed + 1], config)
    with pytest.warns(UserWarning, match=r"a is read 2.00 times \(384 tokens of 192\)"):
        check([192], config)
    with pytest.warns(UserWarning, match="is read 4.00 times"):
        check([96], config)
    with pytest.raises(
        TSTError,
        match=r"--tst-max-epochs: expected no corpus .* 4 times, got what "
        r"a is read 4.04 times \(384 tokens of 95\).* --tst-max-epochs 5",
    ):
        check([95], config)
    with pytest.warns(UserWarning, match="is read 4.04 times"):
        check([95], TSTConfig(3, iters=6, max_epochs=5))
    with pytest.raises(TSTError, match="more than 0.5 times, got what a is read 0.51 times"):
        check([750], TSTConfig(3, iters=6, max_epochs=0.5))
    # the fullest of a blend
    with pytest.raises(TSTError, match="got what b is read 7.20 times"):
        check([4000, 40], config, weights=[1, 3])


def test_a_corpus_that_a_blend_has_twice_is_one_text(tmp_path):
    schedule = Schedule.of(4, 2, train_samples=4, seq_length=8, global_batch_size=1)
    (tmp_path / "link").symlink_to(tmp_path)
    names = str(tmp_path / "a"), str(tmp_path / "link" / "a"), str(tmp_path / "b")
    corpora = [text.Corpus(name, 50, weight) for name, weight in zip(names, (3.0, 1.0, 4.0))]
    a, b = text.readings(corpora, schedule)
    assert (a.corpus.prefix, a.by_phase, b.by_phase) == (names[0], (32.0, 8.0), (32.0, 8.0))
    assert a.times == 0.8


def test_a_number_just_above_the_limit_shows_it():
    schedule = Schedule.of(4, 1, train_samples=2000, seq_length=1000, global_batch_size=1)
    raw = schedule.raw_tokens(2000)
    with pytest.raises(TSTError, match=r"read more than 4 times, got what a is read 4\.0+[1-9]"):
        check([raw // 4 - 3], TSTConfig(4, iters=1), schedule)
    reading = text.Reading(text.Corpus("a", 10**11), (4e11, 1.0))
    assert text._exactly(reading, 4) == (
        "a is read 4.00000000001 times (400,000,000,001 tokens of 100,000,000,000)"
    )
    assert text._exactly(reading, 3.99).startswith("a is read 4.00 times (")


@pytest.mark.parametrize(
    "tokens, weights, config, message",
    [
        (
            [24],
            None,
            MANY,
            "--tst-bag-size: expected at most 2, with --seq-length 8 and the 24 tra",
        ),
        ([30, 20], [1, 1], TSTConfig(7, iters=2), "expected at most 3, .* 30 training tokens of a"),
        ([40], None, TSTConfig((4, 3), iters=(2, 2)), "least common multiple is at most 4, .* 4,3"),
        ([999], None, TSTConfig(10**23, iters=2), "--tst-bag-size: expected at most 124, .* got 1"),
        ([999, 24], None, MANY, "b: expected training text for one sample of 24 tokens .*, got 24"),
        ([0], None, MANY, "a: expected text in its training share, got none"),
        ([999, 0], [1, 1], MANY, "b: expected text in its training share, got none"),
        ([60, 60], None, MANY, "training data: expected 16 samples of 24 tokens, got 4 in 60 tok"),
        ([193, 192], None, MANY, "got 15 in 193 tokens of a, 192 tokens of b. Add data, give the"),
        ([1], None, MANY, "--tst-bag-size: expected at most 0, with .* the 1 training tokens of a"),
    ],
)
def test_text_that_the_bags_do_not_fit_into(tokens, weights, config, message):
    with pytest.raises(TSTError, match=message):
        check(tokens, config, weights=weights)


def test_one_token_more_is_enough():
    assert check([25], MANY)[0].times == 384 / 25
    assert len(check([4000, 25], MANY)) == 2
    assert [reading.times for reading in check([193, 193], MANY)] == [192 / 193] * 2


def test_every_token_of_the_refusals():
    """The whole sentences, of one bag size and of several."""
    sizes = TSTConfig((4, 3), iters=(2, 2))
    with pytest.raises(TSTError) as caught:
        check([95], sizes)
    assert str(caught.value) == (
        "--tst-bag-size: expected bags whose least common multiple is at most 11, with "
        "--seq-length 8 and the 95 training tokens of a, got 4,3. A sample of the run's data is "
        "96 tokens (12 x --seq-length 8) and a label. Lower one of the two, or give more text."
    )
    with pytest.raises(TSTError) as caught:
        check([999, 24], MANY)
    assert str(caught.value) == (
        "b: expected training text for one sample of 24 tokens (3 x --seq-length 8) and a label, "
        "got 24. Lower --tst-bag-size, leave the corpus out or join it to another, or give all "
        "data paths weights (so that Megatron repeats it)."
    )
    with pytest.raises(TSTError) as caught:
        check([96], TSTConfig(3, iters=6, max_epochs=3))
    assert str(caught.value) == (
        "--tst-max-epochs: expected no corpus to be read more than 3 times, got what a is read "
        "4.00 times (384 tokens of 96). Give more text, lower --tst-bag-size or the iterations, "
        "or allow it with --tst-max-epochs 4."
    )


def test_how_many_long_samples_a_text_gives():
    schedule = plan(MANY)
    given = {0: 0, 1: 0, 24: 0, 25: 1, 48: 1, 49: 2}
    assert given == {n: text.long_samples(text.Corpus("a", n), schedule) for n in given}


@pytest.mark.parametrize(
    "given, more",
    [
        (dict(data_path="a b", split="96,2,2"), {}),
        (dict(data_path="2 a 1 b", split="98,1,1"), {}),
        (dict(train_data_path="a", valid_data_path="tiny"), {}),
        (dict(train_data_path="a b", valid_data_path="tiny small"), {}),
        (dict(train_data_path="a", valid_data_path="1 tiny 2 small", test_data_path="tiny b"), {}),
        (dict(train_data_path="a", valid_data_path="tiny small"), dict(full_validation=True)),
        (
            dict(train_data_path="1 a 1 b", valid_data_path="small tiny b"),
            dict(full_validation=True, multiple_validation_sets=True),
        ),
    ],
)
def test_validation_and_test_are_as_stock_builds_them(megatron, corpora, given, more):
    """A corpus that holds no long sample is none of theirs."""
    args = arguments(corpora, **given, **more)
    schedule, valid = plan(MANY), None if more else 4
    stock = provider(args)([schedule.train_samples, valid, 4])[1:]
    with built(args, MANY, schedule, valid) as (_, *ours):
        for one, other in zip(ours, stock):
            sets = (one, other) if isinstance(one, list) else ([one], [other])
            for a, b in zip(*sets, strict=True):
                assert (a is None) == (b is None)
                if a is None:
                    continue
                assert len(a) == len(b) > 0
                for i in range(len(a)):
                    assert np.array_equal(a[i]["tokens"], b[i]["tokens"])


def test_object_storage_is_not_counted():
    assert text.count((["a", "s3://bucket/b"], None), (0.0, 1.0)) is None


def test_a_run_that_has_read_everything_has_a_sample_left(megatron, corpora):
    """Megatron's sampler refuses a dataset without any."""
    args, schedule = arguments(corpora, data_path="a", split="100,0,0"), plan(MANY)
    for consumed, length in ((0, 24), (23, 24), (24, 25), (30, 31)):
        args.consumed_train_samples = consumed
        with built(args, MANY, schedule) as (train, _, _):
            assert len(train) == length
            assert np.array_equal(train[length - 1]["tokens"], train[min(length, 24) - 1]["tokens"])
    assert math.isclose(found(args, MANY, schedule)[0].times, 384 / 3000)
