from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from test_conversion import snapshot
from tiny import randomize, tiny_model

from attnres import AttnResForCausalLM, convert
from attnres.model_cards import CardError, build_card, update_card
from attnres.model_cards.card import REGION, TO_FILL_IN

NAMES = ["loading", "conversion", "configuration", "training", "evaluation"]


def row(task: str, **fields: Any) -> dict[str, Any]:
    """A row of an evaluation's report, as `attnres eval` writes it."""
    return {
        "task": task,
        "metric": "acc",
        "num_fewshot": 5,
        "n": 14042,
        "baseline": 0.2512,
        "baseline_stderr": 0.0036,
        "attnres": 0.2634,
        "attnres_stderr": 0.0037,
        "difference": 0.0122,
        "difference_stderr": 0.0019,
        "p_value": 0.0004,
        "paper_baseline": 0.735,
        "paper_attnres": 0.746,
        "limited": False,
        "dataset": "cais/mmlu",
        **fields,
    }


def write_results(directory: Path, *rows: dict[str, Any], **fields: Any) -> Path:
    report = {
        "model": "/home/somebody/Tiny-AttnRes",
        "baseline": "/home/somebody/tiny-qwen3",
        "rows": list(rows),
        "settings": {
            "batch_size": 8,
            "output": "/home/somebody/results",
            "model_args": "pretrained=/home/somebody/Tiny-AttnRes,dtype=float32",
            "paths": ["C:\\Users\\somebody\\cache", "~/somebody/cache", "https://example.org/a/b", "Qwen/Qwen3-0.6B"],
        },
        "versions": {"lm_eval": "0.4.9"},
        "hardware": {"processor": "2 cores", "accelerator": None},
        "seconds": 512.4,
        "date": "2026-11-23",
        **fields,
    }
    directory.mkdir(exist_ok=True)
    (directory / "report.json").write_text(json.dumps(report))
    return directory


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cards")
    tiny_model("qwen3").save_pretrained(directory / "source")
    convert(directory / "source", directory / "Tiny-AttnRes", num_blocks=4)
    return directory / "Tiny-AttnRes"


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "Tiny-AttnRes")


def read(checkpoint: Path) -> str:
    return (checkpoint / "README.md").read_bytes().decode()


def metadata(checkpoint: Path) -> dict[str, Any]:
    return ModelCard(read(checkpoint)).data.to_dict()


def regions(text: str) -> dict[str, str]:
    return dict(REGION.findall(text))


# -- a new card --------------------------------------------------------------------------------------------------------


def test_the_converter_writes_a_card(checkpoint: Path) -> None:
    report = json.loads((checkpoint / "attnres_conversion.json").read_text())
    text = read(checkpoint)
    assert metadata(checkpoint) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["attnres", "attention-residuals", "arxiv:2603.15031", "custom_code"],
    }
    assert list(regions(text)) == NAMES
    assert "# Tiny-AttnRes\n" in text
    for expected in (
        "source (qwen3, ",
        f"{report['parameters']:,} parameters",
        "576 parameters of depth attention",
        f"| largest difference of two logits | {report['verification']['largest_logit_difference']:.2e} |",
        "| compared | the whole model, in float32, on 256 tokens of a random generator in 4 sequences |",
        "| Kind | Block AttnRes: 4 blocks of 2 sublayers, 8 in all |",
        "| Mix | sum:",
        "has not been trained",
        "\nNot evaluated.\n",
        "trust_remote_code=True",
    ):
        assert expected in text
    assert "tokenizer" not in regions(text)["loading"]
    assert len(TO_FILL_IN.findall(text)) == 3


INHERITED: dict[str, tuple[str, dict[str, Any]]] = {
    "all": (
        "license: other\nlicense_name: tongyi\nlicense_link: LICENSE\nlanguage: [en, de]\nbase_model: a/b\ntags: [x]",
        dict(
            license="other",
            license_name="tongyi",
            license_link="LICENSE",
            language=["en", "de"],
            base_model="a/b",
            base_model_relation="finetune",
        ),
    ),
    "some": ("license: mit\nmodel-index: nonsense", dict(license="mit")),
    "Norwegian": ("language:\n- en\n- no", dict(language=["en", "no"])),
    "other types": ("license: 7\nlanguage: {a: b}\nbase_model: [[a]]\nlicense_name: 2026-01-01", {}),
    "control characters": ('license: "mit\\n\\e[31m"\nlicense_name: ""\nlanguage: []', {}),
    "too long": ("license: " + "x" * 200, {}),
    "code": ("license: !!python/object/apply:os.system [exit]", {}),
    "aliases": ("a: &a [x, x]\nb: &b [*a, *a]\nlicense: [*b, *b]", {}),
    "no YAML": ("license: [", {}),
    "no mapping": ("- license", {}),
    "too deep": ("license: " + "[" * 2000, {}),
    "too large": ("license: mit\nx: " + "x" * 2**20, {}),
}


@pytest.mark.parametrize(("head", "expected"), INHERITED.values(), ids=INHERITED)
def test_what_is_inherited(head: str, expected: dict[str, Any], converted: Path, tmp_path: Path) -> None:
    source = shutil.copytree(converted.with_name("source"), tmp_path / "source")
    (source / "README.md").write_text(f"---\n{head}\n---\n# The original's words\n")
    convert(source, tmp_path / "converted", verify="none")
    found = metadata(tmp_path / "converted")
    names = ("license", "license_name", "license_link", "language", "base_model", "base_model_relation")
    assert {name: found[name] for name in names if name in found} == expected
    text = read(tmp_path / "converted")
    assert "The original's words" not in text
    assert "**Not verified**" in text
    marked = {name for name in ("license", "language", "base_model") if f"`{name}` in the metadata" in text}
    assert marked == {"license", "language", "base_model"} - set(expected)


def test_a_hub_id_is_the_base_model(checkpoint: Path) -> None:
    edit_json(checkpoint / "attnres_conversion.json", source="Qwen/Qwen3-0.6B")
    card = build_card(checkpoint, inherited={"base_model": "Qwen/Qwen3-0.6B-Base", "license": "apache-2.0"})
    assert (card.data["base_model"], card.data["base_model_relation"]) == ("Qwen/Qwen3-0.6B", "finetune")
    assert "| Original model | [Qwen/Qwen3-0.6B](https://huggingface.co/Qwen/Qwen3-0.6B) |" in card.text


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_names_are_no_markup(checkpoint: Path) -> None:
    edit_json(checkpoint / "attnres_conversion.json", source="a | b\n\n# c <!-- attnres:loading:end --> `d` [e](f)")
    card = build_card(checkpoint)
    assert list(regions(card.text)) == NAMES
    assert r"a \| b # c &lt;!-- attnres:loading:end --&gt; \`d\` \[e\](f) (qwen3" in card.text


def test_a_trained_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    model = AttnResForCausalLM.from_pretrained(checkpoint)
    randomize(model)
    model.save_pretrained(tmp_path / "trained")
    state = {"global_step": 1500, "epoch": 2.0, "train_batch_size": 8, "log_history": [{"loss": 3.5}, {"eval_loss": 1}]}
    (tmp_path / "trained" / "trainer_state.json").write_text(json.dumps(state))
    text = read(update_card(tmp_path / "trained").parent)
    assert "no record of a conversion" in text
    assert "The pseudo-queries of 9 of 9 reads are not zero" in text
    assert "[To fill in: on which data" in text
    assert "| Steps | 1,500 |\n| Epochs | 2 |\n| Batch size per device | 8 |\n| Last training loss | 3.5 |" in text


# -- with results ------------------------------------------------------------------------------------------------------


def test_results(checkpoint: Path, tmp_path: Path) -> None:
    limited = row("gsm8k_sample", limited=True, n=12, dataset=None, p_value=None)
    alone = row("hellaswag", metric="acc_norm", dataset=None, baseline=None, baseline_stderr=None, difference=None)
    alone |= dict(difference_stderr=None, p_value=None, num_fewshot=None, paper_baseline=None, paper_attnres=None)
    results = write_results(tmp_path / "results", row("mmlu"), limited, alone)
    update_card(checkpoint, results)
    text = regions(read(checkpoint))["evaluation"]
    assert "| mmlu | acc | 5 | 14,042 | 25.1 ± 0.4 | 26.3 ± 0.4 | +1.2 ± 0.2 | 0.0004 | 73.5 | 74.6 |" in text
    assert r"| **⚠ LIMITED** gsm8k\_sample | acc | 5 | 12 | 25.1 ± 0.4 | 26.3 ± 0.4 | +1.2 ± 0.2 | – |" in text
    assert r"| hellaswag | acc\_norm | – | 14,042 | – | 26.3 ± 0.4 | – | – | – | – |" in text
    assert "**⚠ 1 of 3 rows are LIMITED**" in text
    assert "the baseline is tiny-qwen3, under" in text
    assert "| output | results |" in text
    assert r"| model\_args | pretrained=Tiny-AttnRes,dtype=float32 |" in text
    assert r"| paths | \['cache', 'cache', 'https://example.org/a/b', 'Qwen/Qwen3-0.6B'\] |" in text
    assert "somebody" not in read(checkpoint)
    index = metadata(checkpoint)["model-index"]
    assert [result["dataset"] for result in index[0]["results"]] == [
        {"name": "mmlu", "type": "cais/mmlu"},
        {"name": "hellaswag", "type": "hellaswag"},
    ]
    assert index[0]["results"][0]["metrics"] == [{"type": "acc", "value": 0.2634, "name": "acc, 5-shot, attnres eval"}]


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("acc", 0.2634, "26.3"),
        ("acc_norm", 1.0, "100.0"),
        ("exact_match", 0.0, "0.0"),
        ("f1", 0.5, "50.0"),
        ("pass@1", 0.622, "62.2"),
        ("em", 0.7251, "72.5"),
        ("word_perplexity", 12.4, "12.4000"),
        ("byte_perplexity", 1.75, "1.7500"),
        ("bits_per_byte", 0.8123, "0.8123"),
        ("bleu", 31.25, "31.2500"),
        ("ter", 104.5, "104.5000"),
    ],
)
def test_shares_are_written_in_percent_and_nothing_else_is(
    metric: str, value: float, text: str, checkpoint: Path, tmp_path: Path
) -> None:
    """In the card as in the report, which write scores by one function."""
    scores = dict(baseline=None, baseline_stderr=None, attnres=value, attnres_stderr=None)
    differences = dict(difference=None, difference_stderr=None, p_value=None, paper_baseline=None, paper_attnres=None)
    results = write_results(tmp_path / "results", row("sometask", metric=metric, **scores, **differences))
    line = next(line for line in str(build_card(checkpoint, results=results)).splitlines() if "sometask |" in line)
    assert f"| {text} |" in line.replace("  ", " ")


def test_limited_results_alone_give_no_index(checkpoint: Path, tmp_path: Path) -> None:
    update_card(checkpoint, write_results(tmp_path / "results", row("mmlu", limited=True)))
    assert "model-index" not in metadata(checkpoint)
    update_card(checkpoint, write_results(tmp_path / "results", row("mmlu")))
    assert "model-index" in metadata(checkpoint)
    update_card(checkpoint, write_results(tmp_path / "results", row("mmlu", limited=True)) / "report.json")
    assert "model-index" not in metadata(checkpoint)


def test_updating_again_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    results = write_results(tmp_path / "results", row("mmlu"))
    for arguments in ({}, {"results": results}, {"results": results}, {}, {"repo_id": "user/x"}, {}):
        update_card(checkpoint, **arguments)
        before, previous = read(checkpoint), snapshot(checkpoint)["README.md"]
        update_card(checkpoint, **arguments)
        assert read(checkpoint) == before, previous
    assert "26.3 ± 0.4" in before
    assert 'name = "user/x"\n' in before


# -- a card that somebody wrote in -------------------------------------------------------------------------------------

HAND_WRITTEN = """\
---
# the order, the quotes and this comment are mine
license: 'mit'   # really
language:
  - "no"
model-index:
- name: mine
  results:
  - task: {type: text-generation}
    dataset: {type: lambada, name: LAMBADA}
    metrics: [{type: acc, value: 0.5}]
  # of the model index
tags: [mine]
pipeline_tag: "text-generation"
---

# My model \t

A line with trailing blanks.\x20\x20
<!-- attnres:training:start -->old<!-- attnres:training:end -->
* mine ☃

<!-- attnres:evaluation:start -->

old

<!-- attnres:evaluation:end -->
Last line, without an end"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_what_was_written_by_hand_stays(line_end: str, mark: str, checkpoint: Path, tmp_path: Path) -> None:
    text = mark + HAND_WRITTEN.replace("\n", line_end)
    (checkpoint / "README.md").write_bytes(text.encode())
    update_card(checkpoint, write_results(tmp_path / "results", row("mmlu")))
    updated = read(checkpoint)
    assert updated.replace(line_end, "").count("\n") == 0
    assert "26.3 ± 0.4" in regions(updated)["evaluation"]
    assert "has not been trained" in regions(updated)["training"]
    assert REGION.sub("", updated).split(f"---{line_end}")[-1] == REGION.sub("", text).split(f"---{line_end}")[-1]
    head = updated.split("---" + line_end)[1]
    index = HAND_WRITTEN[HAND_WRITTEN.index("model-index") : HAND_WRITTEN.index("tags: [mine]")]
    kept = HAND_WRITTEN.split("---\n")[1].replace(index, "")
    assert head.startswith(kept.replace("\n", line_end))
    found = yaml.safe_load(head)
    assert (found["license"], found["language"], found["tags"]) == ("mit", ["no"], ["mine"])
    assert [(model["name"], len(model["results"])) for model in found["model-index"]] == [
        ("mine", 1),
        ("Tiny-AttnRes", 1),
    ]
    assert found["library_name"] == "transformers"


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_removed_regions_are_not_put_back_but_for_the_evaluation(
    line_end: str, checkpoint: Path, tmp_path: Path
) -> None:
    mine = f"# Mine{line_end}{line_end}Last line.  {line_end}{line_end}{line_end}"
    (checkpoint / "README.md").write_bytes(mine.encode())
    update_card(checkpoint)
    assert regions(read(checkpoint)) == {}
    assert read(checkpoint).endswith(f"---{line_end}{mine}")
    assert metadata(checkpoint)["library_name"] == "transformers"
    update_card(checkpoint, write_results(tmp_path / "results", row("mmlu")))
    assert list(regions(read(checkpoint))) == ["evaluation"]
    assert f"---{line_end}{mine}{line_end}## Evaluation{line_end}" in read(checkpoint)
    assert read(checkpoint).replace(line_end, "").count("\n") == 0


def write_card(text: str | bytes) -> Callable[[Path, Path], Any]:
    content = text.encode() if isinstance(text, str) else text
    return lambda checkpoint, results: (checkpoint / "README.md").write_bytes(content)


def edit(name: str, **fields: Any) -> Callable[[Path, Path], Any]:
    return lambda checkpoint, results: edit_json(checkpoint / name, **fields)


def rows(*rows: Any, **fields: Any) -> Callable[[Path, Path], Any]:
    return lambda checkpoint, results: write_results(results, *rows, **fields)


START, END = "<!-- attnres:training:start -->", "<!-- attnres:training:end -->"
REFUSED: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "no end": (write_card(f"# x\n{START}\n"), "lacks its other half"),
    "no start": (write_card(f"# x\n{END}\n"), "lacks its other half"),
    "wrong order": (write_card(f"# x\n{END}{START}\n"), "lacks its other half"),
    "nested": (write_card(f"# x\n{START}<!-- attnres:loading:start -->{END}\n"), "lacks its other half"),
    "twice": (write_card(f"# x\n{START}{END}{START}{END}\n"), "is there twice"),
    "no UTF-8": (write_card(b"# \xff\n"), "cannot be read as UTF-8"),
    "no YAML": (write_card("---\nlicense: [\n---\n"), "cannot be read"),
    "no mapping": (write_card("---\n- license\n---\n"), "cannot be read"),
    "flow style": (write_card("---\n{license: mit}\n---\n"), "cannot be"),
    "bad model index": (write_card("---\nmodel-index: [1]\n---\n"), "cannot be read"),
    "other model": (edit("config.json", model_type="llama"), "model_type='llama'"),
    "bad config": (edit("config.json", depth_attention={"block_size": 99}), "block_size=99"),
    "bad report": (edit("attnres_conversion.json", parameters="many"), "is not what the converter writes"),
    "no results": (lambda checkpoint, results: shutil.rmtree(results), "is not readable JSON"),
    "empty": (rows(), "rows is missing or empty"),
    "no object": (rows(1), r"rows\[0\].task is None"),
    "text for a score": (rows(row("a"), row("b", attnres="0.5")), r"rows\[1\].attnres is '0.5'"),
    "NaN": (rows(row("a", attnres=float("nan"))), r"rows\[0\].attnres is nan"),
    "infinity": (rows(row("a", difference=float("inf"))), r"rows\[0\].difference is inf"),
    "truth for a number": (rows(row("a", n=True)), r"rows\[0\].n is True"),
    "limited or not": (rows(row("a", limited=None)), r"rows\[0\].limited is None"),
    "settings": (rows(row("a"), settings=[]), r"settings is \[\]"),
}


@pytest.mark.parametrize(("prepare", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_understood_is_left_as_it_is(
    prepare: Callable[[Path, Path], Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    results = write_results(tmp_path / "results", row("mmlu"))
    prepare(checkpoint, results)
    before = snapshot(checkpoint)
    with pytest.raises(CardError, match=message):
        update_card(checkpoint, results)
    assert snapshot(checkpoint) == before


def test_a_card_that_cannot_be_written(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    before = snapshot(checkpoint)
    with pytest.raises(CardError, match="disk full"):
        update_card(checkpoint, repo_id="user/x")
    assert snapshot(checkpoint) == before
