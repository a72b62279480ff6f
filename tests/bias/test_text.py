"""The summary: everything it promises is in it, and it is a table for TensorBoard."""

from __future__ import annotations

import math

import pytest
import torch

from attn_callbacks.bias import AttentionShare, BiasReport, Calibration, Candidate, Reliance


@pytest.fixture
def report():
    counts = torch.tensor([[[480, 20], [14, 16]], [[25, 5], [40, 460]]])
    share = AttentionShare(torch.tensor([0.123, 0.3]), torch.tensor([1.25, math.nan]), torch.tensor([400, 380]))
    fed = torch.tensor([[70, 10], [0, 20]])
    names = {"class_names": ("negative", "positive"), "group_names": ("Amazon", "Tweets")}
    return BiasReport(3, 120, counts, **names, train_counts=fed, attention={"relevance": share})


def row(text, start, place=0):
    line = [line for line in text.splitlines() if line.startswith(f"| {start} ")][place]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_headline(report):
    headline = report.summary().splitlines()[0]
    assert headline.startswith("**Bias at epoch 3, step 120**: accuracy 0.925 [0.91, 0.94], worst class recall 0.898 [")
    assert "macro-F1 0.925 [" in headline
    assert "worst group accuracy 0.915 [" in headline
    assert "gap between groups 0.021 [0.00, " in headline


def test_class_rows(report):
    text = report.summary()
    assert row(text, "class") == [
        *("class", "support", "recall", "precision", "F1", "label prior", "prediction prior", "training prior"),
    ]
    assert row(text, "negative") == [
        *("negative", "530", "0.953 [0.93, 0.97]", "0.903", "0.927", "0.500", "0.527", "0.700"),
    ]
    assert "Prior shift (total variation): training to labels 0.200, training to predictions 0.173" in text


def test_group_rows(report):
    text = report.summary()
    assert row(text, "Amazon") == ["Amazon", "530", "0.936 [0.91, 0.95]"]
    assert row(text, "Amazon, positive") == ["Amazon, positive", "30", "0.533 [0.36, 0.70]", "0.100"]
    assert "Fairness: demographic parity difference " in text
    assert f"equalised odds difference {report.equalised_odds.difference:.3f} [" in text


def test_attention_rows(report):
    text = report.summary()
    assert row(text, "attention on relevance")[1:] == ["samples", "mass", "chance", "lift"]
    assert row(text, "negative", 1) == ["negative", "400", "0.123", "0.098", "1.25"]
    assert row(text, "positive", 1)[-3:] == ["0.300", "n/a", "n/a"]


def test_findings_are_listed(report):
    text = report.summary()
    assert report.findings
    for finding in report.findings:
        assert f"\n- {' '.join((finding.text, *finding.evidence))}" in text
        line = row(text, f"{finding.kind}: {finding.where}")
        low, high = finding.interval
        assert line[1] == f"{finding.size:.3f} [{low:.2f}, {high:.2f}]"
        assert line[-1] == ", ".join(finding.answers)
    assert text.index("**Findings**") < text.index("| class ")


def test_columns_line_up(report):
    tables = [part for part in report.summary().split("\n\n") if part.startswith("|")]
    assert len(tables) == 5
    for table in tables:
        lines = table.strip().splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len({line.count("|") for line in lines}) == 1


def test_what_else_was_measured():
    counts = torch.tensor([[[480, 20], [14, 486]]])
    bins = torch.zeros(1, 2, 10, 3)
    bins[0, :, 9] = torch.tensor([[500, 475, 480], [500, 490.0, 486]])
    share = AttentionShare(
        *torch.tensor([[0.3, 0.1], [3.0, 1.0], [500, 500]]),
        outcome_mass=torch.tensor([[0.6, 0.25], [0.1, 0.1]]),
        outcome_support=torch.tensor([[20, 480], [14, 486]]),
        outcome_error=torch.full((2, 2), 0.02),
    )
    text = BiasReport(
        *(0, 0, counts, ("negative", "positive")),
        attention={"hashtags": share},
        reliance={"hashtags": Reliance(torch.tensor([[[10, 0], [40, 50]], [[5, 5], [5, 85]]]))},
        calibration=Calibration(bins, torch.tensor([[[100, 50], [50, 40.0]]])),
        divergence=torch.tensor([[0, 0.345], [0.345, 0]]),
        candidates=(Candidate("token 'athos'", 3.0, 0.2, 0.3, 0.1, 60, ("from athos | edu",)),),
    ).summary()
    assert "Calibration error (ECE) 0.001 [0.00, 0.01], mean loss 0.150." in text
    assert row(text, "class")[-2:] == ["ECE", "loss"]
    assert row(text, "negative")[-2:] == ["0.010", "0.200"]
    assert row(text, "attention on hashtags")[-2:] == ["mass if wrong", "mass if right"]
    assert row(text, "negative", 1)[-2:] == ["0.600", "0.250"]
    assert "Attention by position in the sequence differs most between negative and positive: Jensen-Shannon" in text
    assert "distance (base 2, less what chance gives) 0.345." in text
    assert row(text, "hashtags") == [
        *("hashtags", "shuffle", "200", "0.900", "0.700", "0.200 [0.14, 0.26]", "<0.001"),
        *("0.250 [0.20, 0.31]", "<0.001", "negative 0.400"),
    ]
    assert row(text, "token 'athos'") == [
        *("token 'athos'", "attention", "60", "0.300", "0.100", "3.00", "0.200", "from athos \\", "edu"),
    ]
    assert "| feature: hashtags " in text


def candidates_of(*p_values, **arguments):
    found = [Candidate(f"token {n}", 3.0, p, 0.7, 0.5, 60, kind="presence") for n, p in enumerate(p_values)]
    return BiasReport(0, 0, torch.full((1, 2, 2), 50), ("negative", "positive"), candidates=found, **arguments)


def test_table_of_candidates_holds_the_sure_ones_or_few():
    def shown(report):
        lines = report.summary().splitlines()
        return [line.split("|")[1].strip() for line in lines if line.startswith("| token ")]

    assert shown(candidates_of(*[0.9] * 8)) == [f"token {n}" for n in range(5)]
    assert shown(candidates_of(0.9, 0.8, *[1e-6] * 6, 0.7)) == [f"token {n}" for n in range(2, 8)]
    assert shown(candidates_of(0.9, 1e-6)) == ["token 1", "token 0"]
    marked = {"spurious": Reliance(torch.ones(2, 2, 2))}
    assert shown(candidates_of(1e-6, reliance=marked)) == []
    text = candidates_of(1e-6).summary()
    assert "so that 0.5 is chance. Presence: share of samples that hold it." in text
    assert row(text, "token 0") == ["token 0", "presence", "60", "0.700", "0.500", "3.00", "<0.001", ""]
    assert "Presence" not in candidates_of(1e-6, reliance=marked).summary()


def test_candidate_to_be_marked():
    found = Candidate("token 'athos'", 3.0, 1e-9, 0.3, 0.1, 60, ("from athos",))
    text = BiasReport(0, 0, torch.full((1, 2, 2), 50), ("negative", "positive"), candidates=(found,)).summary()
    assert row(text, "feature: token 'athos'")[-1] == "marking it"


def test_names_cannot_break_the_table():
    report = BiasReport(0, 0, torch.ones(1, 2, 2, dtype=torch.int64), ("a|b", "two\nlines"))
    lines = [line for line in report.summary().splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert r"a\|b" in lines[2]
    assert "two lines" in lines[3]


def test_many_classes_are_cut_to_the_lowest():
    classes = 100
    counts = torch.diag(torch.full((classes,), 50)).unsqueeze(0)
    counts[0, 77, 77], counts[0, 77, 0] = 10, 40
    counts[0, 5] = 0
    report = BiasReport(0, 0, counts, tuple(f"c{i}" for i in range(classes)))
    text = report.summary()
    assert row(text, "c77")[2].startswith("0.200")
    assert "The 40 lowest of 100 are shown." in text
    assert "| c5 " not in text  # not measured, hence not low
    assert len(text.splitlines()) < 65


def test_tensorboard_makes_tables_of_it(report):
    plugin_util = pytest.importorskip("tensorboard.plugin_util")
    html = plugin_util.markdown_to_safe_html(report.summary())
    assert html.count("<table>") == 5
    assert html.count("<li>") == len(report.findings)
    assert "<strong>Bias at epoch 3, step 120</strong>" in html
