"""The engine's answers and its refusals, on tiny models."""

import copy
from dataclasses import replace

import made
import pytest
import torch

from probeprune import UsageError, export_gguf
from probeprune.engines.llama_cpp import find_llama_cpp


@pytest.fixture
def model():
    return made.llama()().eval()


@pytest.fixture
def file(model, words, tmp_path):
    return export_gguf(model, tmp_path / "model.gguf", tokenizer=words, type="f32")


def test_scores_of_a_sequence_do_not_depend_on_those_before_it(file, llama_cpp):
    first, second = [5, 9, 40, 3, 7], [11, 12, 13]
    both = llama_cpp.scores(file, [first, second, first], whole=True)
    (alone,) = llama_cpp.scores(file, [second], whole=True)
    assert torch.equal(both[1].all, alone.all) and torch.equal(both[0].all, both[2].all)
    assert both[0].all.shape == (5, 400) and both[0].next.shape == (4,)
    assert torch.equal(both[0].next, both[0].all[:-1].gather(1, torch.tensor([first[1:]]).T)[:, 0])
    torch.testing.assert_close(both[0].all.double().exp().sum(1), torch.ones(5).double(), rtol=0, atol=1e-5)
    (next_alone,) = llama_cpp.scores(file, [first])
    assert next_alone.all is None
    torch.testing.assert_close(next_alone.next, both[0].next, rtol=0, atol=1e-5)
    assert llama_cpp.scores(file, [[5]])[0].next.shape == (0,)


def test_a_text_longer_than_what_the_engine_computes_at_once(words, llama_cpp, tmp_path):
    model = made.llama(max_position_embeddings=1024)().eval()
    file = export_gguf(model, tmp_path / "model.gguf", tokenizer=words, type="f32")
    ids = torch.arange(700) * 7 % 400
    (scores,) = replace(llama_cpp, context=700).scores(file, [ids.tolist()], whole=True)
    with torch.no_grad():
        want = model(ids[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(scores.all, want, rtol=0, atol=1e-3)


def test_the_likeliest_text_ends_where_the_text_ends(model, words, llama_cpp, tmp_path):
    ending = copy.deepcopy(model)
    torch.nn.init.zeros_(ending.lm_head.weight)  # all alike: the first id is taken, which ends a text
    assert words.eos_token_id == 0
    for name, made_of, count in (("ending", ending, 1), ("other", model, 6)):
        file = export_gguf(made_of, tmp_path / f"{name}.gguf", tokenizer=words, type="f32")
        assert len(llama_cpp.greedy(file, [5, 9], 6)) == count


def test_seconds_of_every_repeat(file, llama_cpp):
    found = llama_cpp.speed(file, list(range(20, 60)), 8, repeats=3)
    assert len(found) == 3 and all(prompt > 0 and decode > 0 for prompt, decode in found)
    assert [prompt for prompt, _ in llama_cpp.speed(file, [5], 2)] == [0.0]


def test_the_engines_own_way_is_near_the_exact_one(file, llama_cpp):
    ids = list(range(5, 105))
    (exact,), (own,) = (e.scores(file, [ids]) for e in (llama_cpp, replace(llama_cpp, exact=False)))
    assert 0 < (exact.next - own.next).abs().max() < 0.02


def test_what_the_engine_cannot_run_is_refused_in_its_own_words(file, llama_cpp, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(UsageError, match=r"could not run .*broken.gguf: .*error loading model.*bounds"):
        llama_cpp.scores(broken, [[1, 2]])
    broken.write_bytes(b"no GGUF file at all")
    with pytest.raises(UsageError, match=r"could not run .*broken.gguf: .*invalid magic"):
        llama_cpp.scores(broken, [[1, 2]])
    with pytest.raises(UsageError, match=r"could not run .*nowhere.gguf: .*No such file"):
        llama_cpp.scores(tmp_path / "nowhere.gguf", [[1, 2]])
    with pytest.raises(UsageError, match=r"could not run .*model.gguf: .*invalid token"):
        llama_cpp.scores(file, [[1, 400, 2]])
    with pytest.raises(UsageError, match="257 tokens are more than the context of 256"):
        llama_cpp.greedy(file, [1], 256)


def test_the_library_is_found_in_its_own_folder(llama_cpp):
    assert find_llama_cpp(llama_cpp.library.parent).library == llama_cpp.library
