"""Writes references of the methods that follow full fine-tuning, in float64 numpy from the formulas of their papers."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np
import torch
from common import save_json, save_tensors
from numpy.linalg import eigh, inv, lstsq, norm, pinv, qr, svd

# The weight of a pair is W = base + scale * B A, and the loss 1/2 |W - target|^2, whose gradient is W - target.
# (out, in, r, scale, whether B starts at zero); all pairs of a run are updated in the same steps.
PAIRS = [(7, 5, 2, 2.0, True), (4, 6, 3, 1.5, False)]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def fresh_pairs():
    """The pairs at step 0."""
    pairs = []
    for n, (rows, columns, r, scale, zero) in enumerate(PAIRS):
        base, target = normal(100 + n, rows, columns), normal(110 + n, rows, columns)
        a = 0.5 * normal(120 + n, r, columns)
        b = np.zeros((rows, r)) if zero else 0.5 * normal(130 + n, rows, r)
        pairs.append(dict(base=base, target=target, A=a, B=b, scale=scale))
    return pairs


def gradients(pair):
    """The gradients by W, A and B."""
    a, b, scale = pair["A"], pair["B"], pair["scale"]
    g = pair["base"] + scale * b @ a - pair["target"]
    return g, scale * b.T @ g, scale * g @ a.T


def stacked(traces):
    """`<name>` [steps, ...] of every list in `traces`."""
    return {name: np.stack(values) for name, values in traces.items()}


def store(name, tensors):
    tensors = {key: torch.from_numpy(np.array(value, order="C")) for key, value in tensors.items()}
    save_tensors(HERE / f"{name}.safetensors", tensors, numpy=np.__version__)


def pair_tensors():
    """What every trace starts from."""
    stored = {}
    for n, pair in enumerate(fresh_pairs()):
        stored |= {f"{n}.base": pair["base"], f"{n}.target": pair["target"]}
    return stored


def tangent_projection(a, b, g):
    """The part of g that first-order changes of A and B reach, by least squares on the Jacobian of (A, B) -> B A."""
    rows, columns = g.shape
    by_a = np.kron(b, np.eye(columns))
    by_b = np.kron(np.eye(rows), a.T)
    jacobian = np.hstack([by_a, by_b])
    change = lstsq(jacobian, g.reshape(-1), rcond=None)[0]
    return (jacobian @ change).reshape(g.shape)


# --- LoRA-Pro ---


def sylvester(p, q, c):
    """X with P X + X Q = C, for symmetric positive P and Q."""
    (lam, u), (mu, v) = eigh(p), eigh(q)
    x = u @ ((u.T @ c @ v) / (lam[:, None] + mu[None, :])) @ v.T
    vectorized = np.kron(p, np.eye(len(q))) + np.kron(np.eye(len(p)), q.T)
    np.testing.assert_allclose(x.reshape(-1), np.linalg.solve(vectorized, c.reshape(-1)), rtol=1e-8, atol=1e-12)
    return x


def pro_gradients(a, b, grad_a, grad_b, scale):
    """X, and LoRA-Pro's gradients by A and B with that X and with X = 0."""
    inverse_a = inv(a @ a.T)
    if not b.any():
        x, g_a = np.zeros((len(a), len(a))), np.zeros_like(a)
        g_b = grad_b @ inverse_a / scale**2
        return x, (g_a, g_b), (g_a, g_b)
    gram_b = b.T @ b
    g_a = inv(gram_b) @ grad_a / scale**2
    g_b = (grad_b - b @ inv(gram_b) @ b.T @ grad_b) @ inverse_a / scale**2
    x = sylvester(gram_b, a @ a.T, -g_a @ a.T)
    return x, (g_a + x @ a, g_b - b @ x), (g_a, g_b)


def equivalent(a, b, g_a, g_b, scale):
    """The change of W that changes of A and B make, to first order."""
    return scale * (b @ g_a + g_b @ a)


def check_pro(a, b, g, scale, x, with_x, without):
    """Any X gives the projection of the gradient; this X keeps the gradients closest to LoRA's own."""
    grad_a, grad_b = scale * b.T @ g, scale * g @ a.T
    projection = tangent_projection(a, b, g)
    for g_a, g_b in (with_x, without):
        np.testing.assert_allclose(equivalent(a, b, g_a, g_b, scale), projection, atol=1e-10)
    if b.any():

        def distance(change):
            return norm(with_x[0] + change @ a - grad_a) ** 2 + norm(with_x[1] - b @ change - grad_b) ** 2

        for seed in range(20):
            assert distance(1e-3 * normal(seed, *x.shape)) > distance(np.zeros_like(x))


PRO = dict(steps=3, sgd_lr=0.1, adamw_lr=0.02, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01)


def lora_pro_sgd():
    stored = {}
    for n, pair in enumerate(fresh_pairs()):
        trace = {key: [] for key in ["A", "B", "G", "G_A", "G_B", "X", "g_A", "g_B", "equivalent"]}
        trace["A"].append(pair["A"])
        trace["B"].append(pair["B"])
        for _ in range(PRO["steps"]):
            a, b, scale = pair["A"], pair["B"], pair["scale"]
            g, grad_a, grad_b = gradients(pair)
            x, with_x, without = pro_gradients(a, b, grad_a, grad_b, scale)
            check_pro(a, b, g, scale, x, with_x, without)
            pair["A"], pair["B"] = a - PRO["sgd_lr"] * with_x[0], b - PRO["sgd_lr"] * with_x[1]
            row = dict(A=pair["A"], B=pair["B"], G=g, G_A=grad_a, G_B=grad_b, X=x, g_A=with_x[0], g_B=with_x[1])
            row["equivalent"] = equivalent(a, b, *with_x, scale)
            for key, value in row.items():
                trace[key].append(value)
        stored |= {f"sgd.{n}.{key}": value for key, value in stacked(trace).items()}
    return stored


def lora_pro_adamw():
    beta1, beta2 = PRO["betas"]
    lr, decay, stored = PRO["adamw_lr"], PRO["weight_decay"], {}
    for n, pair in enumerate(fresh_pairs()):
        m = v = np.zeros_like(pair["base"])
        keys = ["A", "B", "G_A", "G_B", "equivalent", "m", "v", "direction", "X", "g_A", "g_B"]
        trace = {key: [] for key in keys}
        trace["A"].append(pair["A"])
        trace["B"].append(pair["B"])
        for t in range(1, PRO["steps"] + 1):
            a, b, scale = pair["A"], pair["B"], pair["scale"]
            _, grad_a, grad_b = gradients(pair)
            _, _, without = pro_gradients(a, b, grad_a, grad_b, scale)
            full = equivalent(a, b, *without, scale)
            m = beta1 * m + (1 - beta1) * full
            v = beta2 * v + (1 - beta2) * full**2
            direction = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + PRO["eps"])
            x, with_x, without = pro_gradients(a, b, scale * b.T @ direction, scale * direction @ a.T, scale)
            check_pro(a, b, direction, scale, x, with_x, without)
            pair["A"] = a - lr * with_x[0] - lr * decay * a
            pair["B"] = b - lr * with_x[1] - lr * decay * b
            row = dict(A=pair["A"], B=pair["B"], G_A=grad_a, G_B=grad_b, equivalent=full, m=m, v=v)
            row |= dict(direction=direction, X=x, g_A=with_x[0], g_B=with_x[1])
            for key, value in row.items():
                trace[key].append(value)
        stored |= {f"adamw.{n}.{key}": value for key, value in stacked(trace).items()}
    return stored


def check_pro_by_hand():
    """The smallest example, r = 1, worked out on paper."""
    a, b = np.array([[3.0, 4.0]]), np.array([[1.0], [2.0], [2.0]])
    g, scale = np.arange(1.0, 7.0).reshape(3, 2), 2.0
    x, with_x, without = pro_gradients(a, b, scale * b.T @ g, scale * g @ a.T, scale)
    np.testing.assert_allclose(x, [[-0.2271241830]], atol=1e-9)
    np.testing.assert_allclose(without[0], [[0.9444444444, 1.2222222222]], atol=1e-9)
    np.testing.assert_allclose(without[1][:, 0], [-0.0888888889, -0.1177777778, 0.1622222222], atol=1e-9)
    np.testing.assert_allclose(with_x[0], [[0.2630718954, 0.3137254902]], atol=1e-9)
    np.testing.assert_allclose(with_x[1][:, 0], [0.1382352941, 0.3364705882, 0.6164705882], atol=1e-9)
    check_pro(a, b, g, scale, x, with_x, without)


# --- AltLoRA+ ---

ALT = dict(steps=4, lr=0.05, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01)


def altlora_plus():
    """Even steps update A, odd steps B. A pseudo-inverse stands in where B is still zero: that step only decays A."""
    beta1, beta2 = ALT["betas"]
    lr, decay, stored = ALT["lr"], ALT["weight_decay"], {}
    for n, pair in enumerate(fresh_pairs()):
        # The other factor as it was when a momentum was last updated.
        b_old, a_old = pair["B"], pair["A"]
        m_a = v_a = np.zeros_like(pair["A"])
        m_b = v_b = np.zeros_like(pair["B"])
        keys = ["A", "B", "M_A", "V_A", "M_B", "V_B"]
        trace = {key: [] for key in [*keys, "G", "g_A", "g_B"]}
        for key, value in zip(keys, (pair["A"], pair["B"], m_a, v_a, m_b, v_b)):
            trace[key].append(value)
        for step in range(ALT["steps"]):
            a, b, scale = pair["A"], pair["B"], pair["scale"]
            g, grad_a, grad_b = gradients(pair)
            if step % 2 == 0:
                inverse = pinv(b.T @ b)
                g_a = inverse @ grad_a / scale**2
                # What moves W along B g_A is the projection of the gradient on the columns of B.
                np.testing.assert_allclose(scale * b @ g_a, b @ pinv(b) @ g, atol=1e-10)
                m_a = beta1 * inverse @ b.T @ b_old @ m_a + (1 - beta1) * g_a
                v_a = beta2 * v_a + (1 - beta2) * g_a**2
                pair["A"] = a - lr * (m_a / (np.sqrt(v_a) + ALT["eps"]) + decay * a)
                b_old = b
                trace["g_A"].append(g_a)
            else:
                inverse = inv(a @ a.T)
                g_b = grad_b @ inverse / scale**2
                np.testing.assert_allclose(scale * g_b @ a, g @ pinv(a) @ a, atol=1e-10)
                m_b = beta1 * m_b @ a_old @ a.T @ inverse + (1 - beta1) * g_b
                v_b = beta2 * v_b + (1 - beta2) * g_b**2
                pair["B"] = b - lr * (m_b / (np.sqrt(v_b) + ALT["eps"]) + decay * b)
                a_old = a
                trace["g_B"].append(g_b)
            trace["G"].append(g)
            for key, value in zip(keys, (pair["A"], pair["B"], m_a, v_a, m_b, v_b)):
                trace[key].append(value)
        stored |= {f"{n}.{key}": value for key, value in stacked(trace).items()}
    return stored


# --- LoRA-RITE ---

RITE = dict(steps=4, lr=0.05, betas=[0.9, 0.999], eps=1e-6, clip_norm=1.0)


def corrected(beta, t):
    """The decay of step t, from 1, that makes the average unbiased without a later correction."""
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def rite_side(state, t, unmagnified, basis):
    """One side's momentum, in coordinates of `basis`, the other factor's. Rows are features, columns the rank."""
    beta1, beta2 = (corrected(beta, t) for beta in RITE["betas"])
    if state["basis"] is not None:
        p = basis.T @ state["basis"]
        state["V"], state["M"] = p @ state["V"] @ p.T, state["M"] @ p.T
    state["basis"] = basis
    state["V"] = beta2 * state["V"] + (1 - beta2) * unmagnified.T @ unmagnified / len(unmagnified)
    values, vectors = eigh(state["V"])
    root = (vectors / (np.sqrt(np.maximum(values, 0)) + RITE["eps"])) @ vectors.T
    state["M"] = beta1 * state["M"] + (1 - beta1) * unmagnified @ root
    return state["M"]


def lora_rite(pairs, clip):
    """The traces of all pairs: gradients of all are clipped together."""
    ranks = [pair["A"].shape[0] for pair in pairs]
    states = [
        {
            "A": dict(basis=None, V=np.zeros((r, r)), M=np.zeros_like(pair["A"].T)),
            "B": dict(basis=None, V=np.zeros((r, r)), M=np.zeros_like(pair["B"])),
        }
        for r, pair in zip(ranks, pairs)
    ]
    traces = [{"A": [pair["A"]], "B": [pair["B"]], "G": [], "unmagnified_norm": []} for pair in pairs]
    for t in range(1, RITE["steps"] + 1):
        work = []
        for pair in pairs:
            g, grad_a, grad_b = gradients(pair)
            (q_a, r_a), (q_b, r_b) = qr(pair["A"].T), qr(pair["B"])
            inverse_a, inverse_b = pinv(r_a), pinv(r_b)
            work.append([g, grad_a.T @ inverse_b, grad_b @ inverse_a, q_a, q_b, inverse_a, inverse_b])
        total = np.sqrt(sum(norm(w[1]) ** 2 + norm(w[2]) ** 2 for w in work))
        factor = min(1.0, RITE["clip_norm"] / total) if clip else 1.0
        for pair, state, trace, (g, u_a, u_b, q_a, q_b, inverse_a, inverse_b) in zip(pairs, states, traces, work):
            m_a = rite_side(state["A"], t, factor * u_a, q_b)
            m_b = rite_side(state["B"], t, factor * u_b, q_a)
            pair["A"] = pair["A"] - RITE["lr"] * (m_a @ inverse_b.T).T
            pair["B"] = pair["B"] - RITE["lr"] * m_b @ inverse_a.T
            trace["A"].append(pair["A"])
            trace["B"].append(pair["B"])
            trace["G"].append(g)
            trace["unmagnified_norm"].append(total)
    return traces


def lora_rite_reference():
    stored = {}
    for name, clip in [("plain", False), ("clipped", True)]:
        traces = lora_rite(fresh_pairs(), clip)
        # The same weights from other factors: A -> S A, B -> B S^-1.
        changed = fresh_pairs()
        changes = [normal(140 + n, len(pair["A"]), len(pair["A"])) for n, pair in enumerate(changed)]
        for pair, change in zip(changed, changes):
            pair["A"], pair["B"] = change @ pair["A"], pair["B"] @ inv(change)
        for n, (trace, other) in enumerate(zip(traces, lora_rite(changed, clip))):
            for a, b, other_a, other_b in zip(trace["A"], trace["B"], other["A"], other["B"]):
                np.testing.assert_allclose(other_b @ other_a, b @ a, rtol=0, atol=1e-8)
                np.testing.assert_allclose(other_a, changes[n] @ a, rtol=0, atol=1e-7)
            assert not clip or trace["unmagnified_norm"][0] > RITE["clip_norm"]
            stored |= {f"{name}.{n}.{key}": value for key, value in stacked(trace).items()}
            if name == "plain":
                stored |= {f"other.{n}.A": changes[n] @ trace["A"][0], f"other.{n}.B": trace["B"][0] @ inv(changes[n])}
    return stored


# --- Starting points from a singular value decomposition ---


def signed_svd(w):
    """U, S, V^T with the largest entry of every left singular vector positive."""
    u, s, vt = svd(w, full_matrices=False)
    assert (s[:-1] / s[1:]).min() > 1.01, "close singular values"
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])])
    return u * signs, s, vt * signs[:, None]


GA = dict(r=2, scale=2.0, gamma=16, shapes=[[12, 9], [8, 11]], clipped=0.02)


def clipped(w, a, b, scale):
    """The authors' norm_clip: no entry of what leaves W exceeds the largest of W."""
    ratio = np.abs(w).max() / np.abs(scale * b @ a).max()
    root = min(1.0, ratio) ** 0.5
    return root * a, root * b


def lora_ga():
    """Factors of every direction and scale, and what the first step of SGD does to W."""
    r, scale, stored = GA["r"], GA["scale"], {}
    for n, shape in enumerate(GA["shapes"]):
        g, w = normal(150 + n, *shape), normal(155 + n, *shape)
        u, s, vt = signed_svd(g)
        best = (u[:, : 2 * r] * s[: 2 * r]) @ vt[: 2 * r]
        directions = {
            "ArB2r": (vt[:r], u[:, r : 2 * r]),
            "A2rBr": (vt[r : 2 * r], u[:, :r]),
            "ArBr": (vt[1 : 2 * r : 2], u[:, 0 : 2 * r : 2]),
        }
        sizes = {"stable": shape[0] ** 0.25 / GA["gamma"] ** 0.5, "unit": 1.0, "gd": 1 / scale}
        sizes["weightS"] = np.sqrt(svd(w, compute_uv=False)[:r] / scale).mean()
        stored |= {f"{n}.G": g, f"{n}.W": w, f"{n}.singular_values": s, f"{n}.best_rank_2r": best}
        for direction, (a, b) in directions.items():
            # B moves by scale g A^T and A by scale B^T g; so does W, by scale^2 times this.
            np.testing.assert_allclose(b @ b.T @ g + g @ a.T @ a, best, atol=1e-10)
            for name, size in sizes.items():
                stored |= {f"{n}.{direction}.{name}.A": size * a, f"{n}.{direction}.{name}.B": size * b}
        # Nothing is shortened above a weight as it is, all of unit length above a small one.
        a, b = directions["ArB2r"]
        np.testing.assert_array_equal(clipped(w, a * sizes["stable"], b, scale)[0], a * sizes["stable"])
        small_a, small_b = clipped(GA["clipped"] * w, a, b, scale)
        assert norm(small_a) < 0.5 * norm(a)
        stored |= {f"{n}.clipped.A": small_a, f"{n}.clipped.B": small_b}
    return stored


WEIGHT = dict(r=3, scale=2.0, shapes=[[10, 8], [6, 9]])


def weight_starts():
    """PiSSA, MiLoRA and OLoRA: factors of a weight, and what is left of it."""
    r, scale, stored = WEIGHT["r"], WEIGHT["scale"], {}
    for n, shape in enumerate(WEIGHT["shapes"]):
        w = normal(160 + n, *shape)
        u, s, vt = signed_svd(w)
        stored |= {f"{n}.W": w, f"{n}.singular_values": s}
        factors = {}
        for name, part in [("pissa", slice(0, r)), ("milora", slice(len(s) - r, len(s)))]:
            root = np.sqrt(s[part] / scale)
            factors[name] = (root[:, None] * vt[part], u[:, part] * root)
        q, upper = qr(w)
        signs = np.where(np.diagonal(upper) < 0, -1.0, 1.0)
        q, upper = q * signs, upper * signs[:, None]
        assert (np.diagonal(upper) > 0).all()
        np.testing.assert_allclose(q @ upper, w, atol=1e-12)
        factors["olora"] = (upper[:r], q[:, :r])
        for name, (a, b) in factors.items():
            stored |= {f"{n}.{name}.A": a, f"{n}.{name}.B": b, f"{n}.{name}.residual": w - scale * b @ a}
        np.testing.assert_allclose(norm(stored[f"{n}.pissa.residual"]) ** 2, (s[r:] ** 2).sum())
        np.testing.assert_allclose(norm(stored[f"{n}.milora.residual"]) ** 2, (s[:-r] ** 2).sum())
    return stored


# --- Starting points from inputs, and from what quantization lost ---


EVA = dict(r=2, rho=2, tokens=30, sides=[8, 6, 10], falls=[0.9, 0.45, 0.75])


def eva():
    """Main directions of the inputs of three sites, and how many of them each site gets out of all."""
    r, most, stored = EVA["r"], EVA["rho"] * EVA["r"], {}
    pool = []
    for n, (side, fall) in enumerate(zip(EVA["sides"], EVA["falls"])):
        turn = qr(normal(190 + n, side, side))[0]
        x = 0.3 + (normal(194 + n, EVA["tokens"], side) * fall ** np.arange(side)) @ turn
        # By a decomposition of the inputs; the scatter is what is stored of them.
        centered = x - x.mean(axis=0)
        _, s, vt = signed_svd(centered)
        shares = s**2 / (s**2).sum()
        stored |= {f"{n}.scatter": centered.T @ centered, f"{n}.A": vt[:most], f"{n}.shares": shares[:most]}
        stored[f"{n}.whitened"] = vt[:most] / np.sqrt(s[:most, None])
        pool += [(share, n) for share in shares[:most]]
    taken = [n for _, n in sorted(pool, reverse=True)[: r * len(EVA["sides"])]]
    ranks = [taken.count(n) for n in range(len(EVA["sides"]))]
    assert min(ranks) > 0 and max(ranks) > r, ranks
    return stored | {"ranks": np.array(ranks)}


CORDA = dict(r=2, scale=2.0, damping=0.01, shapes=[[7, 9], [9, 7]], tokens=[12, 5, 9])


def corda():
    """Factors of a weight oriented by the covariance of its inputs, with the inverse written out."""
    r, scale, stored = CORDA["r"], CORDA["scale"], {}
    for n, (rows, columns) in enumerate(CORDA["shapes"]):
        w = normal(200 + n, rows, columns)
        inputs = [0.2 + normal(210 + 10 * n + k, tokens, columns) for k, tokens in enumerate(CORDA["tokens"])]
        covariance = np.mean([x.T @ x / np.abs(x.max()) ** 2 for x in inputs], axis=0)
        damped = covariance + CORDA["damping"] * np.diag(covariance).mean() * np.eye(columns)
        u, s, vt = signed_svd(w @ damped)
        v = vt @ inv(damped)
        np.testing.assert_allclose((u * s) @ v, w, atol=1e-10)
        stored |= {f"{n}.W": w, f"{n}.covariance": covariance}
        for mode, part in [("ipm", slice(0, r)), ("kpm", slice(len(s) - r, len(s)))]:
            root = np.sqrt(s[part] / scale)
            a, b = root[:, None] * v[part], u[:, part] * root
            stored |= {f"{n}.{mode}.A": a, f"{n}.{mode}.B": b, f"{n}.{mode}.residual": w - scale * b @ a}
    return stored


LOFTQ = dict(r=3, scale=2.0, step=2**-6, shapes=[[10, 8], [6, 9]])


def loftq():
    """Factors of what 8 bits for every row took from a weight, and what is left after them."""
    r, scale, step, stored = LOFTQ["r"], LOFTQ["scale"], LOFTQ["step"], {}
    for n, (rows, columns) in enumerate(LOFTQ["shapes"]):
        # Exact in f32, and in every row one entry with the largest code, so that the codes' step is known.
        w = np.round(0.1 * normal(220 + n, rows, columns) * 4096) / 4096
        w[np.arange(rows), np.arange(rows) % columns] = 127 * step
        q = np.round(w / step) * step
        u, s, vt = signed_svd(w - q)
        root = np.sqrt(s[:r] / scale)
        a, b = root[:, None] * vt[:r], u[:, :r] * root
        left = w - q - scale * b @ a
        np.testing.assert_allclose(norm(left) ** 2, (s[r:] ** 2).sum())
        stored |= {f"{n}.W": w, f"{n}.Q": q, f"{n}.A": a, f"{n}.B": b, f"{n}.left": left}
    return stored


# --- How much of the gradient a step can follow ---


def kappa():
    """|P_T G|^2 / |G|^2 of A, B and G, for ordinary factors and for factors that have lost rank."""
    cases = {
        "tall": (normal(170, 2, 5), normal(171, 7, 2), normal(172, 7, 5)),
        "wide": (normal(173, 3, 9), normal(174, 6, 3), normal(175, 6, 9)),
        "zero_b": (normal(176, 2, 5), np.zeros((7, 2)), normal(177, 7, 5)),
        "rank_one_b": (normal(178, 2, 5), np.outer(normal(179, 7), [1.0, -2.0]), normal(180, 7, 5)),
        "full_rank": (normal(181, 4, 6), normal(182, 4, 4), normal(183, 4, 6)),
    }
    stored = {}
    for name, (a, b, g) in cases.items():
        projection = tangent_projection(a, b, g)
        on_b, on_a = b @ pinv(b), pinv(a) @ a
        np.testing.assert_allclose(projection, on_b @ g + (g - on_b @ g) @ on_a, atol=1e-10)
        value = norm(projection) ** 2 / norm(g) ** 2
        stored |= {f"{name}.A": a, f"{name}.B": b, f"{name}.G": g, f"{name}.projection": projection}
        stored[f"{name}.kappa"] = np.array(value)
    assert abs(stored["full_rank.kappa"] - 1) < 1e-12
    assert all(0 < stored[f"{name}.kappa"] < 1 for name in cases if name != "full_rank")
    return stored


check_pro_by_hand()
store("lora_pro", pair_tensors() | lora_pro_sgd() | lora_pro_adamw())
store("altlora_plus", pair_tensors() | altlora_plus())
store("lora_rite", pair_tensors() | lora_rite_reference())
store("lora_ga", lora_ga())
store("weight_starts", weight_starts())
store("eva", eva())
store("corda", corda())
store("loftq", loftq())
store("kappa", kappa())
pairs = [dict(zip(("out", "in", "r", "scale", "b_starts_at_zero"), pair)) for pair in PAIRS]
save_json(
    HERE / "settings.json",
    {
        "pairs": pairs,
        "lora_pro": PRO,
        "altlora_plus": ALT,
        "lora_rite": RITE,
        "lora_ga": GA,
        "weight_starts": WEIGHT,
        "eva": EVA,
        "corda": CORDA,
        "loftq": LOFTQ,
    },
)
