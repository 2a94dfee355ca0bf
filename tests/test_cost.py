"""FLOPs as counted on what runs equal those of the formulas, and the probe is as cheap as published."""

import platform

import psutil
import pytest
import torch
from tiny import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM

import probeprune
from probeprune.methods import compose
from probeprune.model.blocks import find_blocks
from probeprune.model.cost import PeakMemory, blocks_flops, counting_flops
from probeprune.model.machine import freed_memory_kept, release_freed
from probeprune.model.passes import find_decoder
from probeprune.strategies.probe import Probe, probe_flops
from probeprune.strategies.probe_every_batch import ProbeEveryBatch

LENGTH = 24


def decoder_flops(model, batch: int, length: int = LENGTH) -> int:
    ids = torch.arange(batch * length).remainder(100).view(batch, length) + 3
    with counting_flops() as count, torch.no_grad():
        find_decoder(model)(input_ids=ids, use_cache=False)
    return count.flops


def outside_blocks(model, batch: int) -> int:
    """Matrix products of a decoder that belong to no block (OPT's projections; rotary angles)."""
    blocks = find_blocks(model)
    return decoder_flops(model, batch) - blocks_flops(blocks, [b.units for b in blocks], batch, LENGTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_decoder_is_its_blocks_and_little_else(family):
    model = FAMILIES[family]()
    rest = outside_blocks(model, 2)
    head_dim = find_blocks(model)[0].head_dim
    rotary = head_dim * LENGTH * 2 * 2  # angles: (batch or 1) x (head_dim / 2) x 1 x length, once a kind
    projections = 0
    if getattr(find_decoder(model), "project_in", None) is not None:
        inner, outer = model.config.word_embed_proj_dim, model.config.hidden_size
        projections = 2 * (2 * 2 * LENGTH * inner * outer)
    assert 0 <= rest - projections <= rotary


@pytest.mark.parametrize("units", ["group", "balanced", "query"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_flops_counted_equal_analytic(family, units):
    model = FAMILIES[family]()
    rest = outside_blocks(model, 3)
    with probeprune.attach(model, compose("random", unit_kind=units), 0.3) as handle:
        counted = decoder_flops(model, 3)
        assert counted - rest == blocks_flops(handle.blocks, handle.widths, 3, LENGTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_flops_counted_equal_analytic(family):
    model = FAMILIES[family]()
    rest = outside_blocks(model, 3)
    probe = Probe(tokens=0.5, samples=0.4)
    with probeprune.attach(
        model, compose("probe", when=ProbeEveryBatch(probe, fusion="none")), 0.3
    ) as handle:
        counted = decoder_flops(model, 3)
        own = blocks_flops(handle.blocks, handle.widths, 3, LENGTH)
        assert counted - rest == own + probe_flops(handle.blocks, handle.widths, probe, 3, LENGTH)


@pytest.mark.parametrize("reuse", [0, 1, 3 * LENGTH, 3 * LENGTH + 1, 9 * LENGTH])
def test_a_choice_that_serves_several_batches_is_counted_once(reuse):
    model = FAMILIES["llama-gqa"]()
    rest = outside_blocks(model, 3)
    probe = Probe(reuse=reuse)
    with probeprune.attach(
        model, compose("probe", when=ProbeEveryBatch(probe, fusion="none")), 0.3
    ) as handle:
        counted = sum(decoder_flops(model, 3) - rest for _ in range(6)) / 6
        own = blocks_flops(handle.blocks, handle.widths, 3, LENGTH)
        assert counted == pytest.approx(own + probe_flops(handle.blocks, handle.widths, probe, 3, LENGTH))


def test_probe_share_at_the_papers_shape():
    # LLaMA-2-7B, batch 20, 1024 tokens: published as about 1.5 % of the dense model. Counted on the meta
    # device, by running the real runtime there; nothing is computed.
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    probe = Probe()
    with probeprune.attach(
        model, compose("probe", when=ProbeEveryBatch(probe, fusion="none")), 0.4
    ) as handle:
        ids = torch.zeros(20, 1024, dtype=torch.long, device="meta")
        # A ready mask, since transformers looks into one it makes itself.
        mask = torch.zeros(20, 1, 1024, 1024, device="meta")
        with counting_flops() as count, torch.no_grad():
            find_decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False)
        dense = blocks_flops(handle.blocks, [b.units for b in handle.blocks], 20, 1024)
        own = blocks_flops(handle.blocks, handle.widths, 20, 1024)
        share = probe_flops(handle.blocks, handle.widths, probe, 20, 1024) / dense
        counted_share = (count.flops - own) / dense
    assert counted_share == pytest.approx(share, rel=1e-3)
    # 1.57 % is the published count, of linear maps alone;
    # ours has attention scores too, the probe's and the dense model's.
    assert share == pytest.approx(0.0156, abs=0.0001)


def test_peak_memory_sees_a_tensor_that_is_gone():
    with PeakMemory(torch.device("cpu")) as before:
        pass
    with PeakMemory(torch.device("cpu")) as during:
        block = torch.ones(64 * 2**20)  # 256 MiB
        del block
    # It lived for some ms at least: filling it takes longer than one sample.
    assert during.bytes - before.bytes > 150 * 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_memory_of_large_tensors_is_used_again_inside_and_given_back_behind():
    process, size = psutil.Process(), 100 << 20

    def held_after_use():
        torch.ones(size // 4)  # pages are taken when they are written
        return process.memory_info().rss

    release_freed()  # holes that earlier tests left
    before = held_after_use()
    with freed_memory_kept():
        assert held_after_use() > before + size // 2
    assert process.memory_info().rss < before + size // 2
    assert held_after_use() < before + size // 2
