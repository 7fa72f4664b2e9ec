# Trains the plain PyTorch peer from the weights that dsg wrote, with dsg's optimizer (fp32 master, bf16 moments), on the same tokens,
# and writes loss and gradient norm of each step, as GpuBenchmarks --losses does.
# usage: python3 equal.py torch_proxy.py WEIGHTS LAYERS STEPS LOSSES
import sys, numpy as np, torch

peer, folder, layers, steps, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
# the model alone: everything before the peer builds and times one
source = open(peer).read().split("torch.manual_seed(0)")[0].replace("H, L, S, V = 7168, 4,", f"H, L, S, V = 7168, {layers},")
exec(source, globals())
net = Net()


def read(name, like):
    kind = torch.float32 if like.dtype == torch.float32 else torch.bfloat16
    return torch.from_file(f"{folder}/{name}.bin", size=like.numel(), dtype=kind)


def load(parameter, name, shape=None, turn=False):
    w = read(name, parameter)
    w = w.view(shape) if shape else w.view(parameter.shape)
    parameter.data.copy_(w.transpose(1, 2) if turn else w)


with torch.no_grad():
    load(net.emb, "model.embed_tokens.weight")
    load(net.head, "lm_head.weight")
    load(net.n, "model.norm.weight")
    for i, layer in enumerate(net.layers):
        at = f"model.layers.{i}."
        for parameter, name in [(layer.n1, "input_layernorm"), (layer.n2, "post_attention_layernorm"), (layer.qa, "self_attn.q_a_proj"),
                                (layer.qn, "self_attn.q_a_layernorm"), (layer.qb, "self_attn.q_b_proj"), (layer.kva, "self_attn.kv_a_proj_with_mqa"),
                                (layer.kvn, "self_attn.kv_a_layernorm"), (layer.kvb, "self_attn.kv_b_proj"), (layer.o, "self_attn.o_proj")]:
            load(parameter, f"{at}{name}.weight")
        if layer.dense:
            load(layer.gu, f"{at}mlp.gate_up_proj.weight")
            load(layer.d, f"{at}mlp.down_proj.weight")
        else:
            load(layer.gate, f"{at}mlp.gate.weight")
            load(layer.egu, f"{at}mlp.experts.gate_up_proj.weight", (E, 2 * I, H), True)
            load(layer.ed, f"{at}mlp.experts.down_proj.weight", (E, H, I), True)
            load(layer.sgu, f"{at}mlp.shared_experts.gate_up_proj.weight")
            load(layer.sd, f"{at}mlp.shared_experts.down_proj.weight")


def tokens(n):
    z = np.arange(n, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) % np.uint64(V)).astype(np.int64)).cuda()


np.seterr(over="ignore")
ids = tokens(S)
# fp32 sums of the router as dsg has them
torch.set_float32_matmul_precision("highest")
states = [(p, p.detach().float() if p.dtype != torch.float32 else p.data, torch.zeros_like(p, dtype=bf), torch.zeros_like(p, dtype=bf)) for p in net.parameters()]
lr, b1, b2, eps, decay = 1e-5, 0.9, 0.95, 1e-8, 0.1
lines = []
for step in range(1, steps + 1):
    loss = net(ids)
    loss.backward()
    squares = sum(p.grad.float().square().sum(dtype=torch.float64) for p in net.parameters())
    with torch.no_grad():
        for p, master, m, v in states:
            g = p.grad.float()
            first = m.float().mul_(b1).add_(g, alpha=1 - b1)
            second = v.float().mul_(b2).addcmul_(g, g, value=1 - b2)
            if p.dim() > 1:
                master.mul_(1 - lr * decay)
            root = second.sqrt().mul_((1 - b2 ** step) ** -0.5).add_(eps)
            master.addcdiv_(first, root, value=-lr / (1 - b1 ** step))
            m.copy_(first)
            v.copy_(second)
            if p.dtype != torch.float32:
                p.data.copy_(master)
            p.grad = None
    lines.append(f"{loss.item()!r} {squares.sqrt().item()!r}")
open(out, "w").write("\n".join(lines) + "\n")
