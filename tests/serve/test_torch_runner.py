"""The torch runner's inputs by hand, and its captured steps, replayed here by running them again, beside plain ones.

Legend: S slots  M blocks a sequence at most  T tokens  B parts
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rooflight.models.layout import KVCache, Layout
from rooflight.models.presets import preset
from rooflight.models.tokenizer import Tokenizer
from rooflight.models.transformer import Transformer
from rooflight.ops.attention import paged_cpu
from rooflight.serve import graphs, sampler
from rooflight.serve.clock import RealClock
from rooflight.serve.engine import Engine, StepRecord
from rooflight.serve.inputs import UNKNOWN, Inputs
from rooflight.serve.params import SamplingParams, Structured
from rooflight.serve.request import Request
from rooflight.serve.sampling_upload import Download
from rooflight.serve.scheduler import Scheduler, SchedulerConfig
from rooflight.serve.step import Part, Step
from rooflight.serve.structured import Grammars
from rooflight.serve.torch_runner import TorchRunner
from tests.serve.checkpoints import model_of

CPU = torch.device("cpu")
VOCAB = 256
CONFIG = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=40, max_model_len=120, block_size=8, num_blocks=26)
# What is captured: decode steps of so many sequences, and, by the most tokens of a step, other steps of so many.
BATCHES, SIZES = (1, 2, 4, 6), {40: (8, 16, 40), 5: (5,)}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return model_of(vocab_size=VOCAB).requires_grad_(False).eval()


def tenant(name: str, slot: int, prompt: list[int], blocks: list[int], admission: int = 1) -> Request:
    request = Request(name, prompt, SamplingParams(temperature=0.0), 9)
    request.slot, request.blocks, request.admissions = slot, blocks, admission
    return request


@pytest.fixture
def inputs() -> Inputs:
    cache = KVCache.allocate(preset("tiny"), 21, 4, torch.float32, CPU)
    return Inputs(cache, slots=3, max_tokens=16, max_model_len=20, device=CPU)


def test_what_a_mixed_step_is_fed(inputs: Inputs) -> None:
    """A token that only the device knows, a chunk in a prompt's middle, and a whole prompt."""
    decode = tenant("d", 2, [5, 6, 7, 8, 9], [3, 1])
    chunk = tenant("c", 0, list(range(10, 22)), [7, 4, 2])
    whole = tenant("w", 1, [30, 31], [9])
    inputs.last_S[2] = 77
    step = Step(1, (Part(decode, 5, 1, True, placeholder=True), Part(chunk, 3, 6, False), Part(whole, 0, 2, True)))
    fed = inputs.feed(step)
    paged = fed.layout.paged
    assert paged is not None
    assert fed.tokens_T.tolist() == [77, 13, 14, 15, 16, 17, 18, 30, 31]
    assert fed.positions_T.tolist() == [5, 3, 4, 5, 6, 7, 8, 0, 1]
    # Block · 4 + the place in it.
    assert paged.slots_T.tolist() == [1 * 4 + 1, 7 * 4 + 3, 16, 17, 18, 19, 2 * 4, 36, 37]
    assert paged.context_lengths_B.tolist() == [6, 9, 2]
    assert paged.query_starts_B1.tolist() == [0, 1, 7, 9]
    assert fed.last_B.tolist() == [0, 6, 8]
    assert paged.block_table_BM[:, :3].tolist() == [[3, 1, 20], [7, 4, 2], [9, 20, 20]]
    assert paged.max_query == 6


def test_a_padded_step_is_the_same_and_then_nothing(inputs: Inputs) -> None:
    decode, whole = tenant("d", 2, [5, 6, 7], [3]), tenant("w", 1, [30, 31], [9])
    inputs.send_step(Step(1, (Part(decode, 2, 1, True), Part(whole, 0, 2, True))), tokens=7, rows=4)
    fed = inputs.fed(7, 4, 7, None)
    paged = fed.layout.paged
    assert paged is not None
    assert fed.tokens_T[:3].tolist() == [7, 30, 31] and fed.positions_T[:3].tolist() == [2, 0, 1]
    # The others write to the block that nobody owns, and the rows that read nothing are the spare slot's.
    assert (paged.slots_T[3:] // 4).tolist() == [20] * 4
    assert paged.query_starts_B1.tolist() == [0, 1, 3, 3, 3]
    assert paged.context_lengths_B.tolist() == [3, 2, 0, 0]
    assert set(paged.block_table_BM[2:].flatten().tolist()) == {20}
    assert fed.last_B.tolist()[:2] == [0, 2]


def test_arrays_of_a_decode_step(inputs: Inputs) -> None:
    known, unknown = tenant("k", 1, [5, 6, 7], [3]), tenant("u", 0, [1] * 4, [9, 8])
    parts = (Part(known, 2, 1, True), Part(unknown, 4, 1, True, placeholder=True))
    inputs.table_changes(parts)
    inputs.send([*inputs.decode_arrays(parts, 4), np.array([41, 42], dtype=np.int32)])
    slots, positions, tokens, places, contexts, words = (x.tolist() for x in inputs.decode_inputs(4, 2))
    assert slots == [1, 0, 3, 3]
    assert positions == [2, 4, 0, 0]
    assert tokens[:2] == [7, UNKNOWN]
    assert places == [3 * 4 + 2, 8 * 4, 80, 80]
    assert contexts == [3, 5, 0, 0]
    assert words == [41, 42]


def test_block_tables_follow_growth_and_new_tenants(inputs: Inputs) -> None:
    """Random tenants of three slots, whose blocks grow; the device's table must hold what each request has."""
    draw = random.Random(0)
    held: list[Request | None] = [None] * 3
    for number in range(300):
        step: list[Part] = []
        for slot in range(3):
            request = held[slot]
            if request is None or draw.random() < 0.2:
                # Sometimes the same request again, after a preemption.
                name = request.id if request is not None and draw.random() < 0.5 else f"r{number}-{slot}"
                request = tenant(name, slot, [1], draw.sample(range(20), 1), admission=number + 1)
                held[slot] = request
            elif len(request.blocks) < 5 and draw.random() < 0.5:
                request.blocks = [*request.blocks, draw.randrange(20)]
            if draw.random() < 0.7:
                step.append(Part(request, 0, 1, True))
        if not step:
            continue
        inputs.feed(Step(number, tuple(step)))
        for part in step:
            blocks = part.request.blocks
            assert inputs.table_SM[part.request.slot, : len(blocks)].tolist() == blocks
            assert inputs._table_SM[part.request.slot, : len(blocks)].tolist() == blocks


def test_copies_under_way_are_not_written_over(inputs: Inputs) -> None:
    """Three steps may be on their way at once: each has its own staging."""
    request = tenant("a", 0, [1, 2, 3, 4], [5])
    staged = []
    for start in range(3):
        inputs.feed(Step(start, (Part(request, start, 1, True),)))
        staged.append(inputs._ring[start])
    assert [each[0].item() for each in staged] == [1, 2, 3]
    assert len({each.data_ptr() for each in staged}) == 3


class Again:
    """Stands in for a CUDA graph: runs once more, and writes where the first run wrote."""

    def __init__(self, run: Callable[[int], tuple[Tensor, ...]], size: int, outputs: tuple[Tensor, ...]):
        self._run, self._size, self._outputs, self.replays = run, size, outputs, 0

    def replay(self) -> None:
        self.replays += 1
        for kept, new in zip(self._outputs, self._run(self._size), strict=True):
            kept.copy_(new)


def attend(
    q_THE: Tensor, k_NPKE: Tensor, v_NPKE: Tensor, table_BM: Tensor, contexts_B: Tensor, starts_B1: Tensor, *rest: Any
) -> Tensor:
    """Attention a sequence at a time; rows that pad a step read nothing, as on a GPU, and a CPU's own takes none."""
    out_THE = torch.zeros_like(q_THE)
    groups, scale = q_THE.shape[1] // k_NPKE.shape[2], rest[1]
    for row, context in enumerate(contexts_B.tolist()):
        first, end = starts_B1[row : row + 2].tolist()
        if not context or first == end:
            continue
        k_SHE, v_SHE = (
            cache[table_BM[row].long()].flatten(0, 1)[:context].repeat_interleave(groups, 1)
            for cache in (k_NPKE, v_NPKE)
        )
        scores = torch.einsum("the,she->hts", q_THE[first:end], k_SHE) * scale
        later = torch.arange(context) > torch.arange(context - (end - first), context)[:, None]
        out_THE[first:end] = torch.einsum("hts,she->the", scores.masked_fill(later, -torch.inf).softmax(-1), v_SHE)
    return out_THE


def runner_of(model: Transformer, graphed: bool, tokens: int = CONFIG.max_num_batched_tokens) -> TorchRunner:
    tokenizer = Tokenizer.bytes()
    cache = KVCache.allocate(model.config, CONFIG.num_blocks + 1, CONFIG.block_size, torch.float32, CPU)
    for tensor in (*cache.keys, *cache.values):
        if tensor is not None:
            # What a sequence reads beyond its own would show.
            tensor.fill_(1e4)
    return TorchRunner(
        model,
        cache,
        Grammars(tokenizer, VOCAB, (tokenizer.eos_id,)),
        max_num_seqs=CONFIG.max_num_seqs,
        max_num_batched_tokens=tokens,
        max_model_len=CONFIG.max_model_len,
        seed=4,
        graph_batches=BATCHES if graphed else (),
        graph_tokens=SIZES[tokens] if graphed else (),
    )


PARAMS = [
    SamplingParams(temperature=0.0, ignore_eos=True),
    SamplingParams(seed=1, ignore_eos=True),
    SamplingParams(seed=2, top_k=9, top_p=0.8, ignore_eos=True),
    SamplingParams(seed=3, repetition_penalty=1.4, ignore_eos=True),
    SamplingParams(seed=4, logprobs=2, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(seed=5, structured=Structured("regex", "[ab]{3,9}!")),
    SamplingParams(temperature=0.0, logit_bias={7: 3.0}, min_tokens=4, stop_token_ids=(7,)),
]


ALL = list(range(len(PARAMS)))


def traffic(kinds: list[int], count: int) -> list[Request]:
    draw = random.Random(count)
    found = []
    for index in range(count):
        params = PARAMS[kinds[index % len(kinds)]]
        prompt = [9] * draw.choice((0, 0, 20)) + [draw.randrange(255) for _ in range(draw.choice((1, 5, 30, 60)))]
        embed = len(kinds) > 2 and index % 9 == 8
        limit = 0 if embed else draw.randint(1, 40)
        found.append(Request(f"r{index}", prompt, params, limit, eos_ids=frozenset({255}), embed=embed))
    return found


def answers(
    runner: TorchRunner, ahead: int, requests: list[Request], tokens: int = CONFIG.max_num_batched_tokens
) -> tuple[dict[str, Any], list[StepRecord]]:
    records: list[StepRecord] = []
    engine = Engine(
        Scheduler(replace(CONFIG, max_num_batched_tokens=tokens)),
        runner,
        RealClock(),
        ahead=ahead,
        on_step=records.append,
    )
    told: dict[str, Any] = {}
    left = list(requests)
    while left or engine.has_work:
        # A few at a time: steps of every composition.
        for _ in range(min(2, len(left))):
            engine.add(left.pop(0))
        for output in engine.step():
            request = output.request
            if output.finish_reason is not None:
                answer = request.tokens[len(request.prompt) :]
                prompt = [one.token for one in request.prompt_logprobs or ()]
                told[request.id] = answer, output.finish_reason, output.embedding, prompt
    return told, records


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(("kinds", "tokens"), [([0, 1], 40), (ALL, 40), (ALL, 5)], ids=["drawn", "all kinds", "chunks"])
def test_captured_steps_give_what_plain_ones_give(
    model: Transformer, kinds: list[int], tokens: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded to the sizes that are captured, in every order, with preemptions and the prefix cache."""
    captured: list[Again] = []

    def capture(self: Any, run: Callable[[int], tuple[Tensor, ...]], size: int) -> Any:
        outputs = run(size)
        captured.append(Again(run, size, outputs))
        return graphs._Captured(captured[-1], outputs)  # type: ignore[arg-type]

    monkeypatch.setattr(graphs.Graphs, "_capture", capture)
    expected, _ = answers(runner_of(model, graphed=False), 0, traffic(kinds, 40))
    monkeypatch.setattr(paged_cpu, "paged_attention", attend)
    # As from a GPU: what a step gave is copied before the next one writes there.
    monkeypatch.setattr(sampler, "Download", lambda tensors: Download([tensor.clone() for tensor in tensors]))
    found, records = answers(runner_of(model, graphed=True, tokens=tokens), ahead, traffic(kinds, 40), tokens)
    assert len(captured) == len(BATCHES) + len(SIZES[tokens])
    assert sum(each.replays > 0 for each in captured) >= 4
    assert sum(record.cached_tokens for record in records)
    assert tokens < 40 or sum(record.preempted for record in records)
    # A prompt's next token that gives none yet, beside those that do: a step of one token each that is no decode step.
    assert tokens == 40 or any(0 < record.generated < record.sequences == record.decodes for record in records)
    for name, (answer, reason, embedding, prompt) in expected.items():
        assert found[name][:2] == (answer, reason)
        assert found[name][3] == prompt
        assert (embedding is None) == (found[name][2] is None)
        if embedding is not None:
            assert found[name][2] == pytest.approx(embedding, abs=1e-4)


@torch.no_grad()
def test_one_at_a_time_is_the_dense_model(model: Transformer) -> None:
    requests = traffic([0], 12)
    found, _ = answers(runner_of(model, graphed=False), 1, requests)
    for request in requests[:6]:
        tokens = list(request.prompt)
        while len(tokens) < len(request.prompt) + request.max_tokens:
            count = len(tokens)
            logits_TV = model(torch.tensor(tokens), torch.arange(count), Layout((1, count)))
            tokens.append(int(logits_TV[-1].argmax()))
        assert found[request.id][0] == tokens[len(request.prompt) :]


def test_a_step_tells_its_seconds(model: Transformer) -> None:
    _, records = answers(runner_of(model, graphed=False), 0, traffic([0], 3))
    assert all(0 < record.seconds < record.ended - record.began + 1e-3 for record in records)


def test_closing_twice_is_closing(model: Transformer) -> None:
    runner = runner_of(model, graphed=False)
    runner.close()
    runner.close()
