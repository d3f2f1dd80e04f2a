"""Tiny networks of vectors, signals, sets and graphs."""

from __future__ import annotations

import torch
from tiny import CLASSES, Builder, sequences, tiny, vectors
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm


def mlp(norm: bool) -> nn.Module:
    """MLP of two hidden layers."""
    layers: list[nn.Module] = []
    for i, o in ((12, 32), (32, 24)):
        layers += [nn.Linear(i, o), *([nn.BatchNorm1d(o)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(24, CLASSES))


class Maxout(nn.Module):
    """Largest of three linear maps a unit."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.linear, self.units = nn.Linear(i, 3 * o), o

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(len(x), self.units, 3).max(-1).values


class Highway(nn.Module):
    """Highway layer: a gate between its input and a map of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        share = torch.sigmoid(self.gate(x))
        return share * torch.relu(self.map(x)) + (1 - share) * x


def highway() -> nn.Module:
    """Highway network."""
    return nn.Sequential(nn.Linear(12, 24), Highway(24), Highway(24), nn.Linear(24, CLASSES))


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(32, 12) / 4), nn.Parameter(torch.randn(8, 32) / 4)
        self.b1, self.b2, self.b3 = (nn.Parameter(torch.zeros(n)) for n in (32, 8, 32))

    def forward(self, x: Tensor) -> Tensor:
        code = functional.linear(torch.tanh(functional.linear(x, self.w1, self.b1)), self.w2, self.b2)
        return torch.tanh(functional.linear(code, self.w2.T, self.b3)) @ self.w1


class Siamese(nn.Module):
    """One encoder for two inputs, compared."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = mlp(norm=False)[:-1], nn.Linear(24, CLASSES)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return self.head((self.encoder(one) - self.encoder(two)).abs())


class SkipField(nn.Module):
    """NeRF: sines of places, and the input once more halfway."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(15, 32), nn.Linear(47, 24)
        self.density, self.colour = nn.Linear(24, 1), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        waves = (x[:, :, None] * 2.0 ** torch.arange(2)).flatten(1)
        x = torch.cat([x, waves.sin(), waves.cos()], -1)
        y = torch.relu(self.second(torch.cat([torch.relu(self.first(x)), x], -1)))
        return torch.cat([torch.sigmoid(self.colour(y)), torch.relu(self.density(y))], -1)


# experts


class StackedExperts(nn.Module):
    """Dense soft routing over experts that one tensor holds."""

    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, inner) / 4)
        self.down = nn.Parameter(torch.randn(experts, inner, width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        inner = functional.gelu(torch.einsum("nd,edh->neh", x, self.up))
        return x + torch.einsum("ne,neh,ehd->nd", share, inner, self.down)


class ListedExperts(nn.Module):
    """Dense soft routing over experts that are modules."""

    def __init__(self, width: int, inner: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack([expert(x) for expert in self.experts], 1)
        return x + (self.router(x).softmax(-1).unsqueeze(-1) * made).sum(1)


def mixture(experts: type[nn.Module]) -> nn.Module:
    """A layer of experts between two linear ones."""
    return nn.Sequential(nn.Linear(12, 32), experts(32, 20, 3), nn.LayerNorm(32), nn.Linear(32, CLASSES))


# signals


class Causal(nn.Module):
    """Block of a temporal convolutional network: dilated convolutions that see the past alone."""

    def __init__(self, i: int, o: int, dilation: int) -> None:
        super().__init__()
        self.before = 2 * dilation
        self.one, self.two = (weight_norm(nn.Conv1d(n, o, 3, dilation=dilation)) for n in (i, o))
        self.shortcut = nn.Conv1d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.one(functional.pad(x, (self.before, 0))))
        y = torch.relu(self.two(functional.pad(y, (self.before, 0))))
        return torch.relu(y + self.shortcut(x))


class Temporal(nn.Module):
    """Temporal convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(Causal(12, 16, 1), Causal(16, 16, 2)), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x.transpose(1, 2))[:, :, -1])


class Waves(nn.Module):
    """WaveNet: gated dilated convolutions, skips summed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(12, 16, 1)
        self.gated = nn.ModuleList(nn.Conv1d(16, 40, 2, dilation=d, padding=d) for d in (1, 2))
        self.back = nn.ModuleList(nn.Conv1d(20, 16, 1) for _ in range(2))
        self.skips = nn.ModuleList(nn.Conv1d(20, 24, 1) for _ in range(2))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(24, 28, 1), nn.ReLU(), nn.Conv1d(28, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x.transpose(1, 2)), 0
        for gated, back, skip in zip(self.gated, self.back, self.skips, strict=True):
            one, two = gated(x)[..., : x.shape[-1]].chunk(2, 1)
            y = torch.tanh(one) * torch.sigmoid(two)
            x, total = x + back(y), total + skip(y)
        return self.last(total)


class GatedConvolutions(nn.Module):
    """Gated convolutions of Dauphin et al., by torch's GLU."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(12, 32, 3, padding=1), nn.Conv1d(16, 40, 3, padding=1)
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.glu(self.two(functional.glu(self.one(x.transpose(1, 2)), 1)), 1)
        return self.head(y.mean(-1))


class Recurrent(nn.Module):
    """One of torch's recurrent networks between linear layers."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(12, 16), kind(16, 20, batch_first=True), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.embed(x))[0][:, -1]))


class Elman(nn.Module):
    """Elman network, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.onward, self.head = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 20)
        for step in x.unbind(1):
            state = torch.tanh(self.inward(step) + self.onward(state))
        return self.head(state)


class FourierMixing(nn.Module):
    """FNet: the real part of a Fourier transform over units and tokens, for attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, CLASSES)
        self.mlp = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.norm(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real)
        return self.head((x + self.mlp(x)).mean(1))


# sets, graphs, tables


class PointNet(nn.Module):
    """PointNet: largest of every unit over all points, put beside each point."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv1d(12, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Sequential(nn.Conv1d(48, 24, 1), nn.ReLU(), nn.Conv1d(24, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        local = self.local(x.transpose(1, 2))
        whole = self.wide(local).max(-1, keepdim=True).values
        return self.head(torch.cat([local, whole.repeat(1, 1, local.shape[-1])], 1))


class GraphConvolution(nn.Module):
    """Graph convolutional network of Kipf & Welling."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 20), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        edges = edges + torch.eye(len(edges))
        scale = edges.sum(1).rsqrt()
        edges = scale[:, None] * edges * scale
        return edges @ self.two(torch.relu(edges @ self.one(x)))


class GraphAttention(nn.Module):
    """Graph attention network of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(12, 2 * 16, bias=False), nn.Linear(32, CLASSES)
        self.source, self.target = (nn.Parameter(torch.randn(2, 16)) for _ in range(2))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.project(x).view(len(x), 2, 16)
        scores = functional.leaky_relu((h * self.source).sum(-1)[:, None] + (h * self.target).sum(-1)[None], 0.2)
        share = scores.masked_fill(edges[..., None] == 0, float("-inf")).softmax(1)
        return self.head(functional.elu(torch.einsum("ijh,jhd->ihd", share, h).flatten(1)))


class Recommender(nn.Module):
    """DLRM: products of every two of a few embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 16) for n in (13, 17))
        self.bottom = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 3, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        dense = self.bottom(x)
        every = torch.stack([dense, *(table(ids[:, i]) for i, table in enumerate(self.tables))], 1)
        i, j = torch.tril_indices(3, 3, -1)
        return self.top(torch.cat([dense, (every @ every.transpose(1, 2))[:, i, j]], 1))


class Modulated(nn.Module):
    """FiLM: one network gives the scales and shifts of another."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.film, self.head = nn.Linear(12, 24), nn.Linear(5, 48), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        scale, shift = self.film(given).chunk(2, -1)
        return self.head(torch.relu(self.body(x) * (1 + scale) + shift))


class BilinearFusion(nn.Module):
    """A bilinear form between two encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 16), nn.Linear(12, 20)
        self.fuse, self.head = nn.Bilinear(16, 20, 24), nn.Linear(24, CLASSES)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return self.head(torch.relu(self.fuse(torch.relu(self.one(one)), torch.relu(self.two(two)))))


class Contrast(nn.Module):
    """Two towers and their cosines, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(nn.Linear(12, n), nn.ReLU(), nn.Linear(n, 16)) for n in (24, 32))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        a, b = functional.normalize(self.one(one), dim=-1), self.two(two)
        return self.scale.exp() * a @ (b / b.norm(dim=-1, keepdim=True)).t()


def graph() -> tuple[Tensor, Tensor]:
    """Units of five nodes, and edges between them."""
    edges = (torch.rand(5, 5) < 0.5).float()
    return vectors(), (edges + edges.T + torch.eye(5)).clamp(max=1)


OTHER: dict[str, Builder] = {
    "mlp": tiny(mlp, vectors, norm=False),
    "mlp-bn": tiny(mlp, vectors, norm=True),
    "maxout": tiny(lambda: nn.Sequential(Maxout(12, 20), Maxout(20, 16), nn.Linear(16, CLASSES)), vectors),
    "highway": tiny(highway, vectors),
    "tied-autoencoder": tiny(TiedAutoencoder, vectors),
    "siamese": tiny(Siamese, lambda: (vectors(), vectors())),
    "nerf": tiny(SkipField, lambda: torch.randn(5, 3)),
    "moe-stacked": tiny(mixture, vectors, experts=StackedExperts),
    "moe-listed": tiny(mixture, vectors, experts=ListedExperts),
    "tcn": tiny(Temporal, sequences),
    "wavenet": tiny(Waves, sequences),
    "gated-convolutions": tiny(GatedConvolutions, sequences),
    "lstm": tiny(Recurrent, sequences, kind=nn.LSTM),
    "gru": tiny(Recurrent, sequences, kind=nn.GRU),
    "elman": tiny(Elman, sequences),
    "fnet": tiny(FourierMixing, sequences),
    "pointnet": tiny(PointNet, sequences),
    "gcn": tiny(GraphConvolution, graph),
    "gat": tiny(GraphAttention, graph),
    "dlrm": tiny(Recommender, lambda: (vectors(), torch.randint(0, 13, (5, 2)))),
    "film": tiny(Modulated, lambda: (vectors(), torch.randn(5, 5))),
    "bilinear": tiny(BilinearFusion, lambda: (vectors(), vectors())),
    "two-towers": tiny(Contrast, lambda: (vectors(), vectors())),
}
