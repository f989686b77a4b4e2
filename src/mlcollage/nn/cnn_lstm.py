"""A CNN-LSTM for sequences of words (Izmailov et al. 2021, arXiv:2104.14421, section 4: IMDB)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mlcollage import _checks as checks
from mlcollage.errors import InvalidInput
from mlcollage.nn._parts import Network, Record, cut_normal_, keep, make_activation, through


class _LSTM(nn.Module):
    r"""One layer of LSTM with one bias, over (batch, time, inputs); returns all its states (batch, time, hidden).

    .. math::
        (i, g, f, o) = W_x x_t + W_h h_{t-1} + b, \quad
        c_t = \sigma(f + 1) \, c_{t-1} + \sigma(i) \tanh(g), \quad
        h_t = \sigma(o) \tanh(c_t)

    ``nn.LSTM`` has two biases that only ever act as their sum, so a prior on each would be another prior on the sum;
    and neither a second derivative on a GPU nor a fast path through ``torch.vmap``. These plain operations have both.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.weight_x = nn.Parameter(torch.empty(4 * hidden, inputs))
        self.weight_h = nn.Parameter(torch.empty(4 * hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(4 * hidden))

    def forward(self, x: Tensor) -> Tensor:
        driven = nn.functional.linear(x, self.weight_x, self.bias)  # (batch, time, 4 hidden), all times in one product
        # Zeros like a product, so that states are batched under vmap and have the type that autocast gives them.
        h = c = torch.zeros_like(driven[:, 0, : self.hidden])
        states = []
        for t in range(x.shape[1]):
            gates = driven[:, t] + nn.functional.linear(h, self.weight_h)
            i, g, f, o = gates.chunk(4, dim=-1)  # input, candidate, forget, output: (batch, hidden) each
            c = (f + 1).sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        return torch.stack(states, dim=1)


class CNNLSTM(Network):
    """Embedding, a convolution over time, max-pooling, an LSTM, and a linear map of its last state.

    With the default sizes it is the network of the paper's IMDB experiments, 2,700,098 parameters. As in the authors'
    code, the LSTM has one bias and adds 1 to its forget gate, embeddings start from a normal distribution of standard
    deviation 1, other weights from one of 1 / sqrt(inputs) (both cut at two standard deviations), biases from zero.

    Parameters
    ----------
    vocabulary
        Number of different tokens; inputs are integers below it.
    num_classes
        Number of logits.
    length
        Tokens of one sample; shorter texts are padded.
    embedding
        Width of an embedding.
    filters, kernel_size
        Channels and width of the convolution, which is not padded.
    pool
        Window and stride of the max-pooling; 1 for none.
    hidden
        Width of the LSTM's state.
    activation
        After the convolution: ``"relu"``, or e.g. ``"silu"``, which with ``pool=1`` makes the log-density smooth.

    Raises
    ------
    InvalidInput
        For sizes that are not positive whole numbers or leave no time step, and inputs that are not whole numbers or
        of another length.
    UnknownName
        For an unknown activation.

    Notes
    -----
    Activations, in order of execution: ``embedding`` (batch, length, embedding), ``conv`` (batch, filters, steps),
    ``relu`` (named after the nonlinearity), ``pool``, ``lstm`` (batch, steps, hidden), ``last`` (batch, hidden),
    ``logits``. Where a name is a module's path, the value is that module's output.

    Examples
    --------
    >>> model = CNNLSTM(50, 2, length=20, embedding=8, filters=6, hidden=5)
    >>> logits, acts = model(torch.zeros(3, 20, dtype=torch.long), activations=True)
    >>> list(acts)
    ['embedding', 'conv', 'relu', 'pool', 'lstm', 'last', 'logits']
    >>> tuple(acts["conv"].shape), tuple(acts["pool"].shape), tuple(acts["lstm"].shape)
    ((3, 6, 16), (3, 6, 4), (3, 4, 5))
    """

    def __init__(
        self,
        vocabulary: int = 20_000,
        num_classes: int = 2,
        length: int = 100,
        *,
        embedding: int = 128,
        filters: int = 64,
        kernel_size: int = 5,
        pool: int = 4,
        hidden: int = 128,
        activation: str = "relu",
    ) -> None:
        super().__init__((checks.integer("length", length, least=1),), num_classes)
        self.vocabulary = checks.integer("vocabulary", vocabulary, least=1)
        embedding = checks.integer("embedding", embedding, least=1)
        filters = checks.integer("filters", filters, least=1)
        kernel_size = checks.integer("kernel_size", kernel_size, least=1)
        pool, hidden = checks.integer("pool", pool, least=1), checks.integer("hidden", hidden, least=1)
        if (length - kernel_size + 1) // pool < 1:
            raise InvalidInput(
                f"length={length} leaves no step after a convolution of width {kernel_size} and pooling by {pool}; "
                f"give at least {kernel_size - 1 + pool} tokens."
            )
        self.embedding = nn.Embedding(self.vocabulary, embedding)
        self.conv = nn.Conv1d(embedding, filters, kernel_size)
        self.activation = activation
        self.add_module(activation, make_activation(activation))
        self.pool = nn.MaxPool1d(pool)
        self.lstm = _LSTM(filters, hidden)
        self.head = nn.Linear(hidden, self.num_classes)
        cut_normal_(self.embedding.weight, 1.0)
        cut_normal_(self.conv.weight, 1 / math.sqrt(embedding * kernel_size))
        for weight in (self.lstm.weight_x, self.lstm.weight_h):
            cut_normal_(weight, 1 / math.sqrt(filters + hidden))
        cut_normal_(self.head.weight, 1 / math.sqrt(hidden))
        for bias in (self.conv.bias, self.head.bias):
            nn.init.zeros_(bias)  # type: ignore[arg-type]

    def features(self, x: Tensor, record: Record = None) -> Tensor:
        """Last state of the LSTM, (batch, hidden), for tokens x (batch, length)."""
        if x.dtype not in (torch.int64, torch.int32):
            raise InvalidInput(f"the input is {x.dtype}; tokens are whole numbers: give int64 (or int32).")
        # The convolution wants channels before positions, the LSTM behind them.
        h = keep(record, "embedding", self.embedding(x))
        h = keep(record, "conv", self.conv(h.mT))  # from (batch, length, embedding) to (batch, filters, steps)
        h = through(self, [self.activation, "pool"], h, record)
        h = keep(record, "lstm", self.lstm(h.mT))
        return keep(record, "last", h[:, -1])
