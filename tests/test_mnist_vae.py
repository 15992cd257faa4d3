"""The toy VAE against torch's own layers and distributions, its adapter's reach, the digits and weights that ship."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from sparsecode import UserError, adapters, importance, mnist_vae, record_usage
from sparsecode.mnist_vae import VAE, Block, Classifier, VAEConfig

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "lessons" / "data" / "mnist" / "t10k.npz"
WEIGHTS = ROOT / "weights" / "mnist_vae"
MNIST = ROOT.parent / "shared" / "data"
needs_mnist = pytest.mark.skipif(not (MNIST / "MNIST" / "raw").is_dir(), reason="needs MNIST's own files")


@pytest.fixture(scope="module")
def digits():
    return mnist_vae.load_digits(DIGITS)


@pytest.fixture(scope="module")
def shipped():
    return mnist_vae.load_models(WEIGHTS)


def adapted(seed=0):
    """A random VAE with trained-looking atoms, and latents to decode."""
    torch.manual_seed(seed)
    model = VAE().eval()
    mnist_vae.train_adapter(model, torch.rand(8, 28, 28), density=0.05, steps=1)
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.D)
    return model, torch.randn(4, model.config.latent)


# ---- the model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [7, 4, 14])
def test_patches_are_those_of_unfold_and_go_back(patch):
    images = torch.rand(3, 28, 28)
    patches = mnist_vae.patchify(images, patch)
    assert torch.equal(patches, F.unfold(images[:, None], patch, stride=patch).transpose(1, 2))
    assert torch.equal(mnist_vae.unpatchify(patches, 28), images)


def test_block_is_torchs_pre_norm_encoder_layer():
    """float64 against float64: 1e-12 on numbers near 1."""
    torch.manual_seed(0)
    block = Block(VAEConfig(width=24, heads=3, feedforward=40)).double()
    theirs = nn.TransformerEncoderLayer(24, 3, 40, 0.0, F.gelu, batch_first=True, norm_first=True).double()
    attention = block.attention
    ours = {
        "self_attn.in_proj_weight": torch.cat([p.weight for p in (attention.to_q, attention.to_k, attention.to_v)]),
        "self_attn.in_proj_bias": torch.cat([p.bias for p in (attention.to_q, attention.to_k, attention.to_v)]),
    }
    modules = {"self_attn.out_proj": attention.to_out, "linear1": block.linear_1, "linear2": block.linear_2}
    for name, module in {**modules, "norm1": block.norm_1, "norm2": block.norm_2}.items():
        nn.init.normal_(module.bias)
        ours |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    theirs.load_state_dict(ours)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(block(x), theirs(x), atol=1e-12, rtol=0)


def test_the_paper_s_sizes():
    """Appendix B: 28×28, patch 7, two layers each, width 128, four heads, latent 32."""
    model = VAE()
    assert model.config.tokens == 16
    attentions = [block.attention for half in (model.encoder, model.decoder) for block in half.blocks]
    assert [(a.dim, a.heads) for a in attentions] == [(128, 4)] * 4
    logits, mean, log_variance = model(torch.rand(3, 28, 28))
    assert logits.shape == (3, 28, 28) and mean.shape == log_variance.shape == (3, 32)


def test_latents_are_sampled_with_the_encoders_mean_and_variance():
    """20,000 draws: the mean is off by σ/141 or so, the variance by 1 %; five times that is allowed."""
    torch.manual_seed(0)
    model = VAE()
    model.decoder = nn.Identity()
    images = torch.rand(1, 28, 28).expand(20_000, 28, 28)
    model.encoder.forward = lambda images: (torch.full((len(images), 2), 3.0), torch.tensor([0.0, -2.0]))
    z, _, _ = model(images, torch.Generator().manual_seed(0))
    spread = torch.tensor([1.0, np.exp(-1)])
    assert ((z.mean(0) - 3).abs() < 5 * spread / 141).all()
    torch.testing.assert_close(z.var(0), spread.square().float(), rtol=0.05, atol=0)


def test_both_parts_of_the_loss_are_those_of_torch_distributions():
    torch.manual_seed(0)
    images, logits = (torch.rand(5, 28, 28) < 0.3).double(), torch.randn(5, 28, 28, dtype=torch.float64)
    expected = -Bernoulli(logits=logits).log_prob(images).sum((1, 2)).mean()
    torch.testing.assert_close(mnist_vae.reconstruction(logits, images), expected)
    mean, log_variance = torch.randn(2, 5, 32, dtype=torch.float64)
    q, prior = Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros_like(mean), 1.0)
    torch.testing.assert_close(mnist_vae.divergence(mean, log_variance), kl_divergence(q, prior).sum(1).mean())


# ---- training ---------------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_picture_once():
    visited = []

    def loss(chosen, generator):
        visited.append(chosen)
        return model(torch.zeros(1, 1)).sum()

    model = nn.Linear(1, 1)
    losses = mnist_vae.fit("test", model, loss, 10, 6, batch=4, seed=0)
    assert [len(chosen) for chosen in visited] == [4, 4, 2, 4, 4, 2] and len(losses) == 6
    first, second = torch.cat(visited[:3]), torch.cat(visited[3:])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert not torch.equal(first, second)


def test_pretraining_learns(digits):
    """Sixteen digits, told apart under noise: far better than the mean picture, which knows nothing of its input."""
    images = digits[0].only(5, 6, 7, 8, 9)[:16]
    mean_picture = images.mean(0).clamp(1e-3, 1 - 1e-3).logit().expand_as(images)
    model = mnist_vae.pretrain(images, epochs=200)
    with torch.no_grad():
        logits, _, _ = model(mnist_vae.add_noise(images, torch.Generator().manual_seed(0)))
    assert mnist_vae.reconstruction(logits, images) < 0.8 * mnist_vae.reconstruction(mean_picture, images)


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapter_trains_w_s_and_d_of_the_decoder_and_nothing_else(order):
    torch.manual_seed(0)
    model, images = VAE().eval(), torch.rand(20, 28, 28)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mnist_vae.train_adapter(model, images, density=0.01, order=order, steps=3, seed=1)
    assert list(adapters(model)) == ["decoder.blocks.0.attention", "decoder.blocks.1.attention"]
    after = {name.replace(".base", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after.pop(name), value) for name, value in before.items())
    assert {name.rsplit(".", 1)[1] for name in after} == {"W_s", "D", "usage"}
    torch.manual_seed(1)
    for adapter in adapters(model).values():
        assert adapter.k == 1 and adapter.W_s.shape == (128, 100) and adapter.D.shape == (100, 128)
        assert adapter.D.any() and not torch.equal(adapter.W_s, torch.randn(128, 100) / 128**0.5)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (128 + 128) * 100


def test_atoms_start_where_they_are_told_and_go_to_the_attentions_that_are_named():
    model = VAE().eval()
    mnist_vae.train_adapter(model, torch.rand(4, 28, 28), density=0.02, std=0.0, target=r"encoder\.", steps=0)
    assert list(adapters(model)) == ["encoder.blocks.0.attention", "encoder.blocks.1.attention"]
    assert not any(adapter.D.any() for adapter in adapters(model).values())
    model = VAE().eval()
    mnist_vae.train_adapter(model, torch.rand(4, 28, 28), density=0.02, std=0.5, steps=0)
    for adapter in adapters(model).values():
        assert adapter.D.std().item() == pytest.approx(0.5, abs=0.02)  # 10,000 numbers: 0.5 ± 0.0035


# ---- atoms ------------------------------------------------------------------------------------------------------


def test_contribution_is_what_atoms_of_zeros_would_take_away():
    model, z = adapted()
    mnist_vae.keep_only(model, [3, 50, 120, 199])
    kept = [adapter.keep.clone() for adapter in adapters(model).values()]
    assert [keep.nonzero()[:, 0].tolist() for keep in kept] == [[3, 50], [20, 99]]
    full = mnist_vae.decode(model, z)
    got = mnist_vae.contribution(model, z, torch.tensor([50, 120]))
    assert [adapter.keep.tolist() for adapter in adapters(model).values()] == [keep.tolist() for keep in kept]
    first, second = adapters(model).values()
    first.D.data[50], second.D.data[20] = 0, 0
    assert got.abs().max() > 0.01
    assert torch.equal(got, full - mnist_vae.decode(model, z))


def test_share_by_atoms_counts_with_the_most_important_and_ends_with_all():
    """A stand-in for the classifier reads 1 where a picture is moved far enough: half of them by 20 atoms."""
    model, z = adapted()
    mnist_vae.keep_only(model, [])
    base = mnist_vae.decode(model, z)
    mnist_vae.keep_only(model, torch.arange(200))
    with record_usage(model):
        mnist_vae.decode(model, z)
    mnist_vae.keep_only(model, torch.cat(list(importance(model).values())).topk(20).indices)
    enough = (mnist_vae.decode(model, z) - base).flatten(1).norm(dim=1).median()

    def classifier(pictures):
        return F.one_hot(((pictures - base).flatten(1).norm(dim=1) > enough).long(), 10)

    assert mnist_vae.share_by_atoms(1, model, classifier, z, (200, 20, 0)) == {200: 1, 20: 0.5, 0: 0}
    assert all(adapter.keep.all() for adapter in adapters(model).values())


# ---- digits -----------------------------------------------------------------------------------------------------


def test_digits_that_ship_are_the_10000_of_mnist_in_two_parts(digits):
    train, held_out = digits
    assert len(train.labels) == 8000 and len(held_out.labels) == 2000
    counts = train.labels.bincount() + held_out.labels.bincount()
    assert counts.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert held_out.labels[:2].tolist() == [4, 9]  # MNIST begins with 7 2 1 0 4 1 4 9 5 9
    assert train.labels[:8].tolist() == [7, 2, 1, 0, 1, 4, 9, 5]
    assert train.images.min() == 0 and train.images.max() == 1 and train.images.dtype == torch.float32
    eights = train.only(8)
    assert len(eights) == (train.labels == 8).sum() and torch.equal(eights[0], train.images[train.labels == 8][0])


@needs_mnist
def test_digits_that_ship_are_mnists_own(digits):
    raw = MNIST / "MNIST" / "raw"
    images = torch.from_numpy(np.fromfile(raw / "t10k-images-idx3-ubyte", np.uint8)[16:]).view(-1, 28, 28) / 255
    labels = torch.from_numpy(np.fromfile(raw / "t10k-labels-idx1-ubyte", np.uint8)[8:])
    train, held_out = digits
    assert torch.equal(held_out.images, images[4::5]) and torch.equal(held_out.labels, labels[4::5].long())
    assert torch.equal(train.images[:8], images[[0, 1, 2, 3, 5, 6, 7, 8]]) and train.labels[4] == labels[5]


@needs_mnist
def test_full_training_set():
    train = mnist_vae.full_training_set(MNIST)
    raw = np.fromfile(MNIST / "MNIST" / "raw" / "train-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
    assert train.images.shape == (60_000, 28, 28) and train.labels.bincount().tolist()[3] == 6131
    assert torch.equal(train.images[-1], torch.from_numpy(raw[-1]) / 255)


def test_missing_digits_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no file of digits"):
        mnist_vae.load_digits(tmp_path / "absent.npz")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be downloaded"):
        mnist_vae.full_training_set(tmp_path / "file")


# ---- weights ----------------------------------------------------------------------------------------------------


def test_saved_models_come_back_rounded_to_float16(tmp_path):
    models = VAE(), Classifier()
    mnist_vae.save_models(tmp_path, *models)
    for model, loaded in zip(models, mnist_vae.load_models(tmp_path)):
        for ours, theirs in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
            assert theirs.dtype == torch.float32 and torch.equal(ours.half().float(), theirs)


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no file .*vae.safetensors"):
        mnist_vae.load_models(tmp_path)
    mnist_vae.save_models(tmp_path, VAE(), Classifier())
    tensors = load_file(tmp_path / "classifier.safetensors")
    save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / "classifier.safetensors")
    with pytest.raises(UserError, match="does not hold this model: .*extra") as refusal:
        mnist_vae.load_models(tmp_path)
    assert "\n" not in str(refusal.value)


def test_shipped_classifier_reads_held_out_digits(digits, shipped):
    _, held_out = digits
    with torch.no_grad():
        assert (shipped[1](held_out.images).argmax(1) == held_out.labels).float().mean() >= 0.97


def test_shipped_vae_denoises_what_it_knows_and_makes_3s_into_other_digits(digits, shipped):
    """Held-out digits with noise: 5 to 9 stay what they are, 3s come out as something from 5 to 9, many as 8."""
    vae, classifier = shipped
    _, held_out = digits
    generator = torch.Generator().manual_seed(0)
    known = held_out.labels >= 5
    z = mnist_vae.encode(vae, mnist_vae.add_noise(held_out.images[known], generator))
    assert (mnist_vae.read(vae, classifier, z) == held_out.labels[known]).float().mean() > 0.85
    shown = mnist_vae.read(vae, classifier, mnist_vae.encode(vae, mnist_vae.add_noise(held_out.only(3), generator)))
    assert (shown == 8).float().mean() > 0.1
