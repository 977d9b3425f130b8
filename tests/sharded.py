"""What the processes of tests/processes.py run: an operator on this rank's part of tensors that every rank is given."""

import os
import signal
import time

import torch

import causalattn as ca
from causalattn import distributed


def part(x, mesh, order, lengths, dim):
    """This rank's tokens, lengths of each rank or as shard gives them; not contiguous, as views of models are not."""
    if lengths is None:
        own = distributed.shard(x, mesh=mesh, order=order, dim=dim)
    else:
        rank = mesh.get_local_rank()
        own = x.narrow(dim, sum(lengths[:rank]), lengths[rank])
    return own.transpose(0, -1).contiguous().transpose(0, -1)


def operator(mesh, name, tensors, *, order="contiguous", lengths=None, dim=2, sharded=(), **options):
    """ca.distributed.<name>; `sharded` are options over tokens, along dim."""
    local = [part(x, mesh, order, lengths, dim) for x in tensors]
    options |= {key: part(options[key], mesh, order, lengths, dim) for key in sharded}
    if name not in ("linear_attention", "selective_scan"):
        options["order"] = order
    with distributed.traffic() as sent:
        result = getattr(distributed, name)(*local, mesh=mesh, **options)
    return result, sent


def scan(mesh, u, delta, A, B, C, D, z, *, lengths=None, counted=False, **options):
    local = [part(x, mesh, "contiguous", lengths, 1) for x in (u, delta, B, C, z)]
    u, delta, B, C, z = local
    with distributed.traffic() as sent:
        result = distributed.selective_scan(u, delta, A, B, C, D, z, mesh=mesh, **options)
    return (result, sent) if counted else result


def round_trip(mesh, x, order, dim):
    own = distributed.shard(x, mesh=mesh, order=order, dim=dim)
    return own, distributed.unshard(own, mesh=mesh, order=order, dim=dim)


def wrong(mesh, case):
    """A call that must be refused, before any rank waits for another."""
    q = torch.zeros(1, 2, 4, 8)
    u = torch.zeros(1, 4, 6)
    beyond = ca.full().resolve(8, 8)
    beyond = beyond._replace(stop=beyond.stop + 100)
    calls = {
        "mesh": lambda: distributed.attention(q, q, q, mesh="ranks"),
        "order": lambda: distributed.attention(q, q, q, mesh=mesh, order="striped"),
        "shard order": lambda: distributed.shard(q, mesh=mesh, order="striped"),
        "zigzag": lambda: distributed.attention(*(3 * [q[:, :, : mesh.get_local_rank()]]), mesh=mesh, order="zigzag"),
        "tokens": lambda: distributed.attention(q, q[:, :, 1:], q[:, :, 1:], mesh=mesh),
        "gradient": lambda: distributed.attention(q.requires_grad_(), q, q, mesh=mesh),
        "gradient of v": lambda: distributed.attention(q, q, q.clone().requires_grad_(), mesh=mesh),
        "gradient of scans": lambda: distributed.linear_attention(q, q, q.clone().requires_grad_(), mesh=mesh),
        "rows": lambda: distributed.attention(q, q, q, mesh=mesh, mask=ca.causal().resolve(4, 4)),
        "mask": lambda: distributed.attention(q, q, q, mesh=mesh, mask="causal"),
        "map": lambda: distributed.edge_effects(q, q, q, mesh=mesh, want="map"),
        "slopes": lambda: distributed.attention_stats(q, q, mesh=mesh, want="all", alibi_slopes=torch.ones(2)),
        "n": lambda: distributed.attention_topk(q, q, 0, mesh=mesh),
        "n of a kind": lambda: distributed.attention_topk(q, q, 1.5, mesh=mesh),
        "state": lambda: distributed.linear_attention(
            q, q, q, mesh=mesh, initial_state=ca.LinearState(torch.zeros(1, 2, 8, 7), torch.zeros(1, 2, 8))
        ),
        "state of a scan": lambda: distributed.selective_scan(
            u,
            u,
            -torch.ones(6, 4),
            u[..., :4],
            u[..., :4],
            mesh=mesh,
            initial_state=torch.zeros(1, 6, 3),
        ),
        "backend": lambda: distributed.attention(q, q, q, mesh=mesh, backend="nonsense"),
        "interval": lambda: distributed.attention(q, q, q, mesh=mesh, mask=beyond),
        "dim": lambda: distributed.shard(torch.zeros(3), mesh=mesh),
        "decay": lambda: distributed.linear_attention(q, q, q, mesh=mesh, causal=False, decay=torch.zeros(2)),
    }
    calls[case]()


def disagreeing(mesh, case):
    """A call of which the ranks give different arguments."""
    second = mesh.get_local_rank() == 1
    q = torch.zeros(1, 2, 4, 8)
    narrow = q[..., :4] if second else q
    calls = {
        "dtype": lambda: distributed.attention(*3 * [q.half() if second else q.bfloat16()], mesh=mesh),
        "dim": lambda: distributed.attention(narrow, narrow, q, mesh=mesh),
        "order": lambda: distributed.attention(q, q, q, mesh=mesh, order="zigzag" if second else "contiguous"),
        "causal": lambda: distributed.attention(q, q, q, mesh=mesh, causal=second),
        "scale": lambda: distributed.attention(q, q, q, mesh=mesh, scale=2.0 if second else None),
        "operator": lambda: distributed.attention_topk(q, q, 1, mesh=mesh) if second
        else distributed.attention(q, q, q, mesh=mesh),
        "unshard": lambda: distributed.unshard(narrow, mesh=mesh),
        "n": lambda: distributed.attention_topk(q, q, 1 + second, mesh=mesh),
    }  # fmt: skip
    calls[case]()


def wrong_alone(mesh, case):
    """A call that only the second rank gets wrong."""
    second = mesh.get_local_rank() == 1
    q = torch.zeros(1, 2, 4, 8)
    state = ca.LinearState(torch.zeros(1, 2, 8, 7 if second else 8), torch.zeros(1, 2, 8))
    calls = {
        "v": lambda: distributed.attention(q, q, q[:, :, second:], mesh=mesh),
        "sink": lambda: distributed.attention(q, q, q, mesh=mesh, sink=torch.zeros(2 + second)),
        "state": lambda: distributed.linear_attention(q, q, q, mesh=mesh, initial_state=state),
        "backend": lambda: distributed.attention_stats(q, q, mesh=mesh, backend="nonsense" if second else "auto"),
    }
    calls[case]()


def killed(mesh, rank, kind):
    """One rank dies without a word, the others go on with what they were doing."""
    if mesh.get_local_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    q = torch.zeros(1, 2, 64, 8)
    run = {"attention": ca.distributed.attention, "linear_attention": ca.distributed.linear_attention}[kind]
    return run(q, q, q, mesh=mesh)


def model_of(family):
    """A small model with random weights, the same in every process."""
    import transformers

    torch.manual_seed(0)
    small = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if family == "bert":
        return transformers.BertModel(transformers.BertConfig(intermediate_size=64, **small)).eval()
    if family == "roberta":
        return transformers.RobertaModel(transformers.RobertaConfig(intermediate_size=64, **small)).eval()
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=128)
        return transformers.GPT2LMHeadModel(config).eval()
    if family == "t5":
        config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        return transformers.T5EncoderModel(config).eval()
    rotary = {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
    if family == "jamba":
        config = transformers.JambaConfig(
            use_mamba_kernels=False, num_experts=1, num_experts_per_tok=1, **small, **rotary
        )
        return transformers.JambaForCausalLM(config).eval()
    if family == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        config = transformers.LlamaConfig(**small, **rotary | {"max_position_embeddings": 16}, rope_parameters=rope)
        return transformers.LlamaForCausalLM(config).eval()
    if family == "mistral":
        config = transformers.MistralConfig(sliding_window=9, **small, **rotary)
        return transformers.MistralForCausalLM(config).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **rotary)).eval()


def report(mesh, family, inputs, order=None, **options):
    """What distributed.analyze says, and the layers as progress saw them."""
    seen = []
    model = model_of(family)
    said = model.config._attn_implementation
    found = distributed.analyze(model, inputs, mesh=mesh, order=order, progress=lambda *at: seen.append(at), **options)
    assert model.config._attn_implementation == said
    return found, seen


def peak(mesh, tokens, dim):
    """Bytes that attention in a window holds at most beyond what it was given."""
    from cases import Peak

    own = tokens // mesh.size()
    q, k, v = torch.randn(3, 1, 1, own, dim).unbind()
    options = {"mesh": mesh, "mask": ca.sliding_window(64)}
    distributed.attention(q[:, :, :1024], k[:, :, :1024], v[:, :, :1024], **options)
    with Peak() as held:
        distributed.attention(q, k, v, **options)
    return held.bytes


def timed(mesh, name, tensors, rounds, **options):
    """Seconds of a call, every rank beginning together, with what it sent and gave."""
    operator(mesh, name, tensors, **options)
    seconds = []
    for _ in range(rounds):
        torch.distributed.barrier(mesh.get_group())
        start = time.perf_counter()
        result, sent = operator(mesh, name, tensors, **options)
        seconds.append(time.perf_counter() - start)
    return result, sent, seconds
