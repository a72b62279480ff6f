"""Frames around maps in the colours of clusters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from attn_callbacks import AttentionHeatmaps, ErrorAnalysis, HeadRoles
from attn_callbacks._lightning import MisconfigurationException
from attn_callbacks.callbacks import _error_pictures, attention_heatmaps
from attn_callbacks.callbacks._frames import frame_colours
from attn_callbacks.render import cluster_colours, head_colours
from tests.callbacks.models import Classifier, csv_logger, fit, quiet_trainer

GREY = cluster_colours(np.array([-1]))[0].tolist()


def trainer_with(labels: list[list[int]] | None, names: tuple[str, ...] = ("one", "two")) -> Any:
    roles = HeadRoles()
    if labels is not None:
        roles.head_clusters = SimpleNamespace(labels=torch.tensor(labels), layer_names=names)  # type: ignore[assignment]
    return SimpleNamespace(callbacks=[roles])


def test_heads_have_the_colours_of_their_numbers() -> None:
    found = frame_colours("head", trainer_with(None), [("one", 3), ("two", 0), ("two", 3)])
    assert found.tolist() == head_colours(4)[[3, 0, 3]].tolist()


def test_heads_of_one_cluster_have_one_colour_in_all_layers() -> None:
    trainer = trainer_with([[0, 2, 1], [2, -1, 0]])
    one, two = (frame_colours("cluster", trainer, [(layer, head) for head in range(3)]) for layer in ("one", "two"))
    palette = head_colours(3).tolist()
    assert one.tolist() == [palette[0], palette[2], palette[1]]
    assert two.tolist() == [palette[2], GREY, palette[0]]


def test_what_is_not_known_is_grey() -> None:
    assert frame_colours("cluster", trainer_with(None), [("one", 0)]).tolist() == [GREY]
    found = frame_colours("cluster", trainer_with([[0, 0]], ("one",)), [("cross", 0), ("one", 5), ("one", 1)])
    assert found.tolist()[:2] == [GREY, GREY]
    assert found.tolist()[2] != GREY


@pytest.mark.parametrize("others", [[], [HeadRoles(clusters=False)], [HeadRoles(drift_samples=0)]])
@pytest.mark.parametrize("kind", [AttentionHeatmaps, ErrorAnalysis])
def test_nobody_to_take_clusters_from(kind: Any, others: list[Any], tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [*others, kind(frames="cluster")], logger=csv_logger(tmp_path))
    with pytest.raises(MisconfigurationException, match=rf"`{kind.__name__}\(frames='cluster'\)` takes clusters from"):
        fit(Classifier(), trainer)


@pytest.mark.parametrize("kind", [AttentionHeatmaps, ErrorAnalysis])
def test_other_words_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="`frames` must be one of"):
        kind(frames="layer")


def test_maps_are_framed_by_what_the_run_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    drawn: dict[str, list[list[list[int]]]] = {"heat": [], "errors": []}

    def keep(place: str, draw: Any) -> Any:
        def drawing(*values: Any, colours: Any, **options: Any) -> Any:
            drawn[place].append(colours.tolist())
            return draw(*values, colours=colours, **options)

        return drawing

    monkeypatch.setattr(attention_heatmaps, "attention_heads", keep("heat", attention_heatmaps.attention_heads))
    monkeypatch.setattr(_error_pictures, "attention_heads", keep("errors", _error_pictures.attention_heads))
    roles = HeadRoles()
    callbacks = [roles, AttentionHeatmaps(samples=1, frames="cluster"), ErrorAnalysis(samples=1, frames="cluster")]
    fit(Classifier(), quiet_trainer(tmp_path, callbacks, logger=csv_logger(tmp_path), max_epochs=2))
    clusters = roles.head_clusters
    assert clusters is not None
    colours = cluster_colours(clusters.labels.numpy()).tolist()
    assert drawn["heat"][:2] == [[GREY, GREY]] * 2  # two layers, in the first epoch
    assert all(GREY not in frames for frames in drawn["heat"][2:])
    known = [colour for layer in colours for colour in layer]
    assert sorted(drawn["errors"][-1]) == sorted(known)
