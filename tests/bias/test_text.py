"""The summary: everything it promises is in it, and it is a table for TensorBoard."""

from __future__ import annotations

import math

import pytest
import torch

from attn_callbacks.bias import AttentionShare, BiasReport


@pytest.fixture
def report():
    counts = torch.tensor([[[480, 20], [14, 16]], [[25, 5], [40, 460]]])
    share = AttentionShare(torch.tensor([0.123, 0.3]), torch.tensor([1.25, math.nan]), torch.tensor([400, 380]))
    fed = torch.tensor([[70, 10], [0, 20]])
    names = {"class_names": ("negative", "positive"), "group_names": ("Amazon", "Tweets")}
    return BiasReport(3, 120, counts, **names, train_counts=fed, attention={"relevance": share})


def row(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_headline(report):
    headline = report.summary().splitlines()[0]
    assert headline.startswith("**Bias at epoch 3, step 120**: accuracy 0.925, worst class recall 0.898")
    assert "worst group accuracy 0.915" in headline
    assert "gap 0.021" in headline


def test_class_rows(report):
    text = report.summary()
    assert row(text, "class") == [
        *("class", "support", "recall", "precision", "F1", "label prior", "prediction prior", "training prior"),
        *("relevance mass", "relevance lift"),
    ]
    assert row(text, "negative") == [
        *("negative", "530", "0.953 ± 0.009", "0.903", "0.927", "0.500", "0.527", "0.700", "0.123", "1.250"),
    ]
    assert row(text, "positive")[-2:] == ["0.300", "n/a"]


def test_group_rows(report):
    text = report.summary()
    assert row(text, "Amazon") == ["Amazon", "530", "0.936 ± 0.011"]
    assert row(text, "Amazon, positive") == ["Amazon, positive", "30", "0.533", "0.100"]


def test_findings_are_listed(report):
    text = report.summary()
    assert report.findings
    for finding in report.findings:
        assert f"\n- {finding.text}" in text


def test_columns_line_up(report):
    tables = report.summary().split("\n\n")[1:4]
    for table in tables:
        lines = table.strip().splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len({line.count("|") for line in lines}) == 1


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
    assert len(text.splitlines()) < 60


def test_tensorboard_makes_tables_of_it(report):
    plugin_util = pytest.importorskip("tensorboard.plugin_util")
    html = plugin_util.markdown_to_safe_html(report.summary())
    assert html.count("<table>") == 3
    assert html.count("<li>") == len(report.findings)
    assert "<strong>Bias at epoch 3, step 120</strong>" in html
