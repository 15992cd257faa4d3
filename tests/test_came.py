"""CAME against the came-pytorch package, step by step, and against a step that can be written out."""

import came_pytorch
import pytest
import torch

from dit.came import CAME

SHAPES = {"matrix": (7, 5), "row": (1, 6), "vector": (9,), "scalar": (), "blocks": (3, 4, 4), "more": (2, 3, 4, 5)}


def parameters(shapes=SHAPES.values()):
    """At zero, so that what is compared is what the steps add up to, not rounded to the size of a start."""
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def give_gradients(lists, step):
    """The same gradients to all, of sizes that change from element to element and from step to step."""
    generator = torch.Generator().manual_seed(100 + step)
    for together in zip(*lists):
        shape = together[0].shape
        g = torch.randn(shape, generator=generator) * 10 ** torch.empty(shape).uniform_(-4, 1, generator=generator)
        for parameter in together:
            parameter.grad = g.clone() * (5 if step == 3 else 1)


@pytest.mark.parametrize("options", [
    {}, dict(lr=3e-3), dict(betas=(0.5, 0.9, 0.99)), dict(eps=(1e-3, 1e-2)), dict(clip_threshold=0.3),
])  # fmt: skip
def test_every_step_equals_came_pytorch(options):
    ours, theirs = parameters(), parameters()
    optimizer, reference = CAME(ours, **options), came_pytorch.CAME(theirs, **{"lr": 1e-4, **options})
    for step in range(15):
        give_gradients((ours, theirs), step)
        optimizer.step()
        reference.step()
        for shape, a, b in zip(SHAPES, ours, theirs):
            assert relative(a, b) < 2e-6, f"{shape} at step {step}"
            assert a.abs().min() > 0


def test_atoms_without_a_gradient():
    """As of a sparse adapter: D at zero gives W_s no gradient at first, atoms that nothing uses get none later, and
    W_s has a row for a channel that is always 0."""
    ours, theirs = parameters([(6, 8), (8, 6)]), parameters([(6, 8), (8, 6)])
    optimizer, reference = CAME(ours), came_pytorch.CAME(theirs, lr=1e-4)
    for step in range(12):
        give_gradients((ours, theirs), step)
        for W_s, D in (ours, theirs):
            W_s.grad[:, :2] = W_s.grad[0] = 0
            D.grad[:2] = 0
            W_s.grad *= step > 0
        optimizer.step()
        reference.step()
        for a, b in zip(ours, theirs):
            assert (a - b).norm() <= 2e-6 * b.norm()  # W_s stays at zero in the first step
    assert not ours[0][:, :2].any() and not ours[1][:2].any()
    assert not ours[0][0].any() and ours[0][1:, 2:].all() and ours[1][2:].all()


def test_first_step_of_a_matrix():
    """g = a bᵀ is factored exactly: u has the size 1/√(1 − β₂), clipped to ±1, m = ±0.1, S = 10⁻⁴ · 0.9²."""
    a, b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, -1.0])
    theta = torch.nn.Parameter(torch.zeros(3, 2))
    theta.grad = torch.outer(a, b)
    CAME([theta], lr=0.01).step()
    expected = -0.01 * 0.1 / (0.01 * 0.9) * theta.grad.sign()  # 11 times lr
    torch.testing.assert_close(theta.data, expected, rtol=1e-5, atol=0)


def test_a_state_that_was_saved_goes_on_to_the_bit(tmp_path):
    ours = parameters()
    optimizer = CAME(ours)
    for step in range(4):
        give_gradients((ours,), step)
        optimizer.step()
    torch.save({"weights": ours, "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = [torch.nn.Parameter(weight.detach().clone()) for weight in state["weights"]]
    resumed = CAME(other, lr=1)
    resumed.load_state_dict(state["optimizer"])
    for step in range(4, 8):
        give_gradients((ours, other), step)
        optimizer.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, other))


def test_memory():
    """What Adam keeps twice for each number of a matrix, CAME keeps once, and four vectors."""
    theta = torch.nn.Parameter(torch.ones(100, 50))
    theta.grad = torch.ones(100, 50)
    optimizer = CAME([theta])
    optimizer.step()
    assert sum(value.numel() for value in optimizer.state[theta].values()) == 100 * 50 + 2 * (100 + 50)


def test_what_has_no_gradient_stays():
    still, moved = parameters([(3, 3), (3, 3)])
    moved.grad = torch.ones(3, 3)
    CAME([still, moved]).step()
    assert not still.any() and moved.all()
