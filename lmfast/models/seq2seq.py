"""Sequence to sequence: recurrent encoder, attending decoder, greedy and beam decoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmfast.models.beam import beam_search
from lmfast.models.encoder_decoder import ATTENTIONS, Decoder, DecoderState, Encoder, Memory
from lmfast.models.output import loss_of
from lmfast.ops._library import is_readable


class Translation(NamedTuple):
    """What `Seq2Seq.generate` found.

    Attributes:
        ids: (B, n) int64, from the first token to the end-of-text id, padded behind it.
        scores: (B,) log-probability over |ids| ** length_penalty.
        attention: (B, n, S) weights, a row per token of ids, or None without attention.
    """

    ids: Tensor
    scores: Tensor
    attention: Tensor | None


class Seq2Seq(nn.Module):
    """A recurrent encoder-decoder with attention.

    The decoder starts from the encoder's final states, through a linear layer and tanh. Unless
    `input_feeding` is set, training computes all steps of a layer and of the attention together.

    Args:
        source_vocab, target_vocab: numbers of ids.
        emb_dim, hidden_dim: widths E of embeddings and H of states.
        cell: "rnn", "lstm", "gru" or "gru_textbook".
        num_layers: of encoder and decoder each.
        attention: "bahdanau", "dot", "general", "scaled", or None for the final states alone.
        bidirectional: whether the encoder reads both ways.
        input_feeding: whether a step sees the features of the one before.
        dropout: on embeddings, between layers and on the features.
        pad_idx, bos_idx, eos_idx: of padding, the beginning and the end of a text, in both
            vocabularies.

    Raises:
        ValueError: an unknown cell or attention, ids outside a vocabulary, widths that a score
            cannot compare.

    Backends: those of the recurrent layers, `lmfast.ops.additive_attention` and
    `linear_cross_entropy`.

    Source: Sutskever, Vinyals and Le 2014, arXiv:1409.3215; Bahdanau, Cho and Bengio 2015,
    arXiv:1409.0473.

    Example:
        >>> import torch
        >>> model = Seq2Seq(20, 30, emb_dim=8, hidden_dim=16)
        >>> source, target = torch.randint(3, 20, (2, 5)), torch.randint(3, 30, (2, 4))
        >>> model.loss(source, target).shape, model.generate(source, max_length=6).ids.shape[0]
        (torch.Size([]), 2)
    """

    def __init__(
        self,
        source_vocab: int,
        target_vocab: int,
        *,
        emb_dim: int = 256,
        hidden_dim: int = 512,
        cell: str = "lstm",
        num_layers: int = 1,
        attention: str | None = "bahdanau",
        bidirectional: bool = True,
        input_feeding: bool = False,
        dropout: float = 0.0,
        pad_idx: int = 0,
        bos_idx: int = 1,
        eos_idx: int = 2,
    ) -> None:
        super().__init__()
        if attention is not None and attention not in ATTENTIONS:
            raise ValueError(
                f"attention must be one of {', '.join(ATTENTIONS)} or None, got {attention!r}"
            )
        for name, index in (("pad_idx", pad_idx), ("bos_idx", bos_idx), ("eos_idx", eos_idx)):
            if not 0 <= index < target_vocab:
                raise ValueError(f"{name} must be in 0..{target_vocab - 1}, got {index}")
        self.pad_idx, self.bos_idx, self.eos_idx = pad_idx, bos_idx, eos_idx
        self.vocab_size = target_vocab
        self.encoder = Encoder(
            source_vocab, emb_dim, hidden_dim, cell=cell, num_layers=num_layers,
            bidirectional=bidirectional, dropout=dropout, pad_idx=pad_idx,
        )  # fmt: skip
        width = self.encoder.output_dim
        states = 2 if cell == "lstm" else 1
        self.bridge = nn.ModuleList(nn.Linear(width, hidden_dim) for _ in range(states))
        self.decoder = Decoder(
            target_vocab, emb_dim, hidden_dim, width, cell=cell, num_layers=num_layers,
            dropout=dropout, attention=attention, input_feeding=input_feeding, pad_idx=pad_idx,
        )  # fmt: skip
        self.fc = nn.Linear(hidden_dim, target_vocab)

    def encode(
        self, source: Tensor, source_lengths: Tensor | None = None
    ) -> tuple[Memory, DecoderState]:
        """Return what the decoder needs of sources (B, S): its memory and its first state.

        Args:
            source: (B, S) int64, padded on the right.
            source_lengths: (B,) int64; None: up to the last id that is not padding.
        """
        if source.dim() != 2 or source.shape[1] == 0:
            raise ValueError(
                f"source must be (B, S) with at least one token, got {tuple(source.shape)}"
            )
        if source_lengths is None:
            steps = torch.arange(1, source.shape[1] + 1, device=source.device)
            source_lengths = ((source != self.pad_idx) * steps).amax(1)
            if is_readable(source) and bool((source_lengths == 0).any()):
                row = int((source_lengths == 0).nonzero()[0])
                raise ValueError(f"source must have a token in every row, row {row} is all padding")
        states, final = self.encoder(source, source_lengths)
        hidden = tuple(torch.tanh(layer(h)) for layer, h in zip(self.bridge, final, strict=True))
        return self.decoder.remember(states, source_lengths), DecoderState(hidden, None)

    def features(
        self,
        source: Tensor,
        target: Tensor,
        *,
        source_lengths: Tensor | None = None,
        teacher_forcing: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the features (B, T, H) that predict each token of `target`, and the attention.

        Args:
            source: (B, S) int64.
            target: (B, T) int64, what is to be said: it ends with `eos_idx` and padding. The
                decoder sees it one step later, after `bos_idx`.
            source_lengths: as of `encode`.
            teacher_forcing: probability that a step sees the token before as given; else the
                likeliest one by the model itself.
            generator: source of randomness for that.

        Returns:
            Features and attention weights (B, T, S), or None without attention.
        """
        if not 0 <= teacher_forcing <= 1:
            raise ValueError(f"teacher_forcing must be in [0, 1], got {teacher_forcing}")
        if target.dim() != 2 or target.shape[1] == 0:
            raise ValueError(
                f"target must be (B, T) with at least one token, got {tuple(target.shape)}"
            )
        if source.dim() != 2 or source.shape[0] != target.shape[0]:
            raise ValueError(
                f"source must be (B, S) with the B of target {tuple(target.shape)}, "
                f"got {tuple(source.shape)}"
            )
        memory, state = self.encode(source, source_lengths)
        begin = torch.full_like(target[:, :1], self.bos_idx)
        inputs = torch.cat((begin, target[:, :-1]), 1)
        if teacher_forcing == 1 or target.shape[1] < 2:
            features, weights, _ = self.decoder(inputs, memory, state)
            return features, weights
        forced = torch.rand(inputs.shape, generator=generator, device="cpu") < teacher_forcing
        forced = forced.to(source.device)
        outputs, attended = [], []
        tokens = inputs[:, :1]
        for t in range(inputs.shape[1]):
            features, w, state = self.decoder(tokens, memory, state)
            outputs.append(features)
            attended += [] if w is None else [w]
            if t + 1 < inputs.shape[1]:
                own = self.fc(features.detach()).argmax(-1)
                tokens = torch.where(forced[:, t : t + 1], inputs[:, t + 1 : t + 2], own)
        return torch.cat(outputs, 1), torch.cat(attended, 1) if attended else None

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        *,
        source_lengths: Tensor | None = None,
        teacher_forcing: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the logits (B, T, V) of each token of `target`; arguments as of `features`."""
        features, _ = self.features(
            source,
            target,
            source_lengths=source_lengths,
            teacher_forcing=teacher_forcing,
            generator=generator,
        )
        return self.fc(features)

    def loss(
        self,
        source: Tensor,
        target: Tensor,
        *,
        source_lengths: Tensor | None = None,
        teacher_forcing: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the tokens of `target` that are not padding.

        Args:
            source, target, source_lengths, teacher_forcing, generator: as of `features`.

        Returns:
            A scalar; the logits are never stored.
        """
        features, _ = self.features(
            source,
            target,
            source_lengths=source_lengths,
            teacher_forcing=teacher_forcing,
            generator=generator,
        )
        return loss_of(self.fc, features, target, self.pad_idx)

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        *,
        source_lengths: Tensor | None = None,
        max_length: int = 100,
        num_beams: int = 1,
        length_penalty: float = 1.0,
    ) -> Translation:
        """Say what the model finds likeliest: greedily, or by beam search.

        Args:
            source, source_lengths: as of `encode`.
            max_length: longest result, the end of the text included.
            num_beams: hypotheses per row; 1 is greedy.
            length_penalty: scores are log-probabilities over length ** length_penalty.

        Returns:
            A `Translation`. Set `eval()` before, or dropout acts.

        Raises:
            ValueError: max_length or num_beams is not positive.
        """
        for name, value in (("max_length", max_length), ("num_beams", num_beams)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        memory, state = self.encode(source, source_lengths)
        if num_beams == 1:
            best, scores = self._greedy(memory, state, max_length, length_penalty)
        else:
            best, scores = self._beams(memory, state, max_length, num_beams, length_penalty)
        # The weights of the best texts by one more pass, rather than of all hypotheses on the way.
        begin = torch.full_like(best[:, :1], self.bos_idx)
        _, weights, _ = self.decoder(torch.cat((begin, best[:, :-1]), 1), memory, state)
        return Translation(best, scores, weights)

    def _greedy(
        self, memory: Memory, state: DecoderState, max_length: int, length_penalty: float
    ) -> tuple[Tensor, Tensor]:
        batch, device = memory.states.shape[0], memory.states.device
        tokens = torch.full((batch, 1), self.bos_idx, dtype=torch.int64, device=device)
        scores, lengths = torch.zeros(batch, device=device), torch.zeros(batch, device=device)
        running = torch.ones(batch, dtype=torch.bool, device=device)
        chosen: list[Tensor] = []
        while not chosen or (len(chosen) < max_length and bool(running.any())):
            features, _, state = self.decoder(tokens, memory, state)
            log_p, best = self.fc(features[:, 0]).log_softmax(-1).max(-1)
            scores += torch.where(running, log_p.float(), 0)
            lengths += running
            chosen.append(torch.where(running, best, self.pad_idx))
            running = running & (best != self.eos_idx)
            tokens = best[:, None]
        return torch.stack(chosen, 1), scores / lengths**length_penalty

    def _beams(
        self,
        memory: Memory,
        state: DecoderState,
        max_length: int,
        num_beams: int,
        length_penalty: float,
    ) -> tuple[Tensor, Tensor]:
        batch, device = memory.states.shape[0], memory.states.device
        beams = memory.repeated(num_beams)

        def step(tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
            features, _, state = self.decoder(tokens[:, None], beams, state)
            return self.fc(features[:, 0]).log_softmax(-1), state

        ids, scores, _ = beam_search(
            step,
            DecoderState.reordered,
            state.reordered(torch.arange(batch, device=device).repeat_interleave(num_beams)),
            batch=batch,
            num_beams=num_beams,
            max_length=max_length,
            bos_idx=self.bos_idx,
            eos_idx=self.eos_idx,
            pad_idx=self.pad_idx,
            length_penalty=length_penalty,
            device=device,
        )
        return ids[:, 0], scores[:, 0]
