"""Vision models of timm and torchvision, which take attention each in their own way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attn_callbacks.capture import AttentionRecorder
from tests.capture.reference import attention_rows, close


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"]
)
@pytest.mark.parametrize("fused", [True, False])
def test_timm(name: str, fused: bool) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, depth=2, img_size=56) if "dinov3" not in name else timm.create_model(name, depth=2)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    size = 56 if "dinov3" not in name else 64
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        plain = model.eval()(images)
        with AttentionRecorder(model) as recorder:
            assert torch.equal(model(images), plain)
    assert [call.name for call in recorder.calls] == ["blocks.0.attn", "blocks.1.attn"]
    for call in recorder.calls:
        assert (call.scores is None) == fused
        assert torch.allclose(call.weights().sum(dim=-1), torch.ones(call.shape[:3]), atol=1e-5)


def test_timm_fused_and_eager_agree() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=56).eval()
    images, maps = torch.randn(2, 3, 56, 56), []
    for fused in (True, False):
        for block in model.blocks:
            block.attn.fused_attn = fused
        with torch.no_grad(), AttentionRecorder(model) as recorder:
            model(images)
        maps.append([call.weights() for call in recorder.calls])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*maps, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_torchvision(training: bool) -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.0, num_classes=3
    ).train(training)
    images, inputs = torch.randn(2, 3, 32, 32), []
    with torch.set_grad_enabled(training):
        plain = model(images)
        with AttentionRecorder(model) as recorder:
            assert torch.equal(model(images), plain)
    names = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    assert [call.name for call in recorder.calls] == names
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, args: inputs.append((m, args[0]))) for n in names
    ]
    model(images)
    for handle in handles:
        handle.remove()
    for call, (module, tokens) in zip(recorder.calls, inputs, strict=True):
        assert close(call.weights(), _own(module, tokens))


def _own(module: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return module(tokens, tokens, tokens, need_weights=True, average_attn_weights=False)[1]


def test_torchvision_swin_attends_in_windows() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[2], num_heads=[2], window_size=[4, 4], num_classes=3
    ).eval()
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(torch.randn(2, 3, 32, 32))
    assert [call.name for call in recorder.calls] == ["features.1.0.attn", "features.1.1.attn"]
    assert [call.shape for call in recorder.calls] == [(8, 2, 16, 16)] * 2


def test_a_vision_transformer_by_hand_agrees_with_plain_rows() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
    with torch.no_grad(), AttentionRecorder(model) as recorder:
        model(torch.randn(1, 3, 32, 32))
    (call,) = recorder.calls
    assert close(call.weights(), attention_rows(call.query, call.key, scale=call.scale))
