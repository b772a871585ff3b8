"""BART as two functions: ``prefill`` encodes documents, ``extend`` runs the decoder over new nodes of token trees.

transformers supplies the weights; the arithmetic is that of ``models/bart/modeling_bart.py``, with three differences
that do not change it: documents are packed one behind the other instead of padded, the projections of queries, keys
and values are one product (:mod:`generator_svc.engine.layers`), and the decoder's rows of all documents and all
questions go through each product together.

Shapes: P packed source tokens, R packed decoder rows, D model, H heads, E head, V vocabulary, L layers,
S tokens of one document, M new nodes of one document, C cached nodes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import BartForConditionalGeneration

from generator_svc.checkpoint import own
from generator_svc.engine import kernels
from generator_svc.engine.affine import Affine, rounded
from generator_svc.engine.attention import (
    Attention,
    Rows,
    Segments,
    attend,
    length_mask,
    row_order,
    slot_order,
    widened,
)
from generator_svc.engine.backend import Parts
from generator_svc.engine.cache import (
    FIRST_NODES,
    KEPT_PADDING,
    DocumentCache,
    Group,
    SourcePlaces,
    alike,
    chunks,
    runs,
    zeros,
)
from generator_svc.engine.int8 import Int8Affine, states_dtype
from generator_svc.engine.layers import Block, CrossAttention, Norm, Product, Products
from generator_svc.engine.trials import ROWS

# What a CPU does at once, between which others have their turn: at most so much, and in a larger model less, down to a
# quarter, so that it takes so many multiplications by weights.
#
# Tokens of documents: enough rows for the products to be at their fastest, few enough that intermediate results stay in
# caches and in memory that malloc reuses rather than maps anew each time. A batch of 4240 took 2.63 s at once, 2.38 in
# groups of 1024, 2.52 in groups of 512 (BART-base, float32).
CPU_TOKENS = 1024
# Rows of the decoder: a step is no faster a row with more; scoring would be by 3 %, with twice as many.
CPU_ROWS = 512
# What those are for BART-base, 0.2 s in float32 on two AVX-512 cores. BART-large's parts take 4 to 8 % longer in all.
CPU_MULTIPLICATIONS = 5e10
ALIGNED_ROWS = 64
POSITION_OFFSET = 2  # BartLearnedPositionalEmbedding keeps two rows that nobody uses


class Bart:
    """The two halves of a ``BartForConditionalGeneration``, on its device and in its dtype, or with products in int8.

    On a CPU the model loses the weights: they are held in another order.
    """

    def __init__(self, model: BartForConditionalGeneration, *, int8: bool = False) -> None:
        config: Any = model.config
        if int8:
            nn.Module.to(model, states_dtype())
        for module in model.modules() if model.device.type == "cpu" else ():
            if not isinstance(module, nn.Linear) or module is model.lm_head:  # which are copied into another order
                own(module)
        encoder, decoder = model.model.encoder, model.model.decoder
        self.heads = int(config.decoder_attention_heads)
        self.encoder_heads = int(config.encoder_attention_heads)
        self.dtype, self.device = model.dtype, model.device
        self.on_cpu = self.device.type == "cpu"
        """Where a launch costs nothing, and padding as much as text."""
        to_sources = [getattr(m.encoder_attn, name) for m in decoder.layers for name in ("k_proj", "v_proj")]
        of_sources = sum(map(_numbers, to_sources))
        self._encoder_numbers = _numbers(encoder.layers) + of_sources
        self._decoder_numbers = _numbers(decoder.layers) - of_sources + model.lm_head.weight.numel()
        # one table for all, unless the configuration unties them
        self.encoder_embed = encoder.embed_tokens.weight.data
        self.decoder_embed = decoder.embed_tokens.weight.data
        self.embed_scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.encoder_positions = encoder.embed_positions.weight.data[POSITION_OFFSET:]
        self.decoder_positions = decoder.embed_positions.weight.data[POSITION_OFFSET:]
        self.encoder_norm = Norm.of(encoder.layernorm_embedding)
        self.decoder_norm = Norm.of(decoder.layernorm_embedding)
        product: Products = partial(Int8Affine.of_modules, out=self.dtype) if int8 else Affine.of_modules
        self.encoder_layers = [Block.of(m, product) for m in encoder.layers]
        self.decoder_layers = [(Block.of(m, product), CrossAttention.of(m, product)) for m in decoder.layers]
        self.vocab_size = len(model.lm_head.weight)
        self._head = self._output(model, int8=int8)

    def _output(self, model: BartForConditionalGeneration, *, int8: bool) -> Product:
        """From the last states to logits.

        On CUDA with rows of padding, so that every row of logits begins where many bytes can be moved at once. A table
        of words that shares the matrix becomes a view of it.
        """
        head, bias = model.lm_head.weight, model.final_logits_bias.data[0].to(self.dtype)
        if int8:
            return Int8Affine(head.data, bias, out=torch.float32)
        if self.on_cpu:
            return Affine(head.data, bias)
        spare = -len(head) % ALIGNED_ROWS
        padded, shared = pad(head.data, (0, 0, 0, spare)), head.data.data_ptr()
        head.data = padded[: len(head)]
        tables = {name: getattr(self, name) for name in ("encoder_embed", "decoder_embed")}
        for name, table in tables.items():
            if table.data_ptr() == shared:
                setattr(self, name, head.data)
        return Affine(padded, pad(bias, (0, spare)))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Multiplies few rows and many with each of a step's matrices, so that the faster kernel is found for them."""
        layer, cross = self.decoder_layers[0]
        for rows in () if self.on_cpu else ROWS:
            x_RD = torch.randn(rows, self.decoder_embed.shape[1], dtype=self.dtype, device=self.device)
            layer.qkv(x_RD)
            layer.norm.after(layer.out, x_RD, x_RD)
            cross.q(x_RD)
            layer.feed_forward(x_RD)
            self.logits(x_RD)

    @property
    def cpu_tokens(self) -> int:
        """Of documents, that a CPU encodes at once."""
        return _at_once(CPU_TOKENS, self._encoder_numbers)

    @property
    def cpu_rows(self) -> int:
        """Of the decoder, that a CPU computes at once."""
        return _at_once(CPU_ROWS, self._decoder_numbers)

    @property
    def source_bytes(self) -> int:
        """What a document's cache takes for each token of its context: keys and values of every layer."""
        return int(len(self.decoder_layers) * 2 * self.decoder_embed.shape[1] * self.dtype.itemsize)

    def caches(self, documents: int, positions: int) -> Sequence[Tensor]:
        """Room for keys and values: (2, N, H, positions, E) a layer, views of one block."""
        width = self.decoder_embed.shape[1] // self.heads
        layers = len(self.decoder_layers)
        return zeros(layers, 2, documents, self.heads, positions, width, dtype=self.dtype, device=self.device).unbind()

    def _embed(self, ids: Tensor, words: Tensor, positions: Tensor, table: Tensor, norm: Norm) -> Tensor:
        return kernels.embed(words, ids, table, positions, norm, scale=self.embed_scale)

    @torch.inference_mode()
    def prefill(self, contexts: Sequence[Tensor], nodes: int) -> Parts[list[DocumentCache]]:
        """Caches for documents that are encoded here.

        Args:
            contexts: token ids of each document, (S,) without padding.
            nodes: the most that a document's token tree will have, where that is known.
        """
        # neighbours in length share a group, which pads them to the longest
        order = sorted(range(len(contexts)), key=lambda at: len(contexts[at])) if self.on_cpu else range(len(contexts))
        ordered = [contexts[at] for at in order]
        documents: dict[int, DocumentCache] = {}
        parts: list[tuple[Sequence[Tensor], list[DocumentCache]]] = []
        for together in alike([len(context) for context in ordered], *(KEPT_PADDING if self.on_cpu else ())):
            lengths = [len(context) for context in ordered[together]]
            source = widened(max(lengths), self.decoder_embed)
            first_nodes = widened(min(nodes, FIRST_NODES), self.decoder_embed)
            group = Group(self.caches(len(lengths), source), self.caches(len(lengths), first_nodes))
            made = [DocumentCache(group, slot, length) for slot, length in enumerate(lengths)]
            if self.on_cpu:
                of_group = ordered[together]
                parts += [(of_group[chunk], made[chunk]) for chunk in chunks(lengths, self.cpu_tokens)]
            documents |= zip(order[together], made, strict=True)
        found = [documents[at] for at in range(len(contexts))]
        if not self.on_cpu and contexts:
            parts = [(contexts, found)]
        for at, (of_part, made) in enumerate(parts):
            if at:
                yield
            self.encode(of_part, made)
        return found

    @torch.inference_mode()
    def encode(self, contexts: Sequence[Tensor], documents: Sequence[DocumentCache]) -> None:
        """Computes the cross-attention keys and values of every layer, once, and puts them into documents' caches.

        Args:
            contexts: token ids of each document, (S,) without padding.
        """
        lengths = [len(c) for c in contexts]
        tokens_P, positions_P = torch.cat(list(contexts)), torch.cat([torch.arange(n) for n in lengths])
        if self.on_cpu:  # here, where it is a number a row, and not before each product
            reach = len(tokens_P) - lengths[-1] + widened(lengths[-1], self.decoder_embed)
            spare = rounded(reach) - len(tokens_P)
            tokens_P, positions_P = pad(tokens_P, (0, spare)), pad(positions_P, (0, spare))
        tokens_P, positions_P = torch.stack([tokens_P, positions_P]).to(self.device)
        x_PD = self._embed(tokens_P, self.encoder_embed, positions_P, self.encoder_positions, self.encoder_norm)
        # One document after the other on a CPU, which computes padding as slowly as text. What one is widened by are
        # rows of the next.
        parts = [[n] for n in lengths] if self.on_cpu else [lengths[part] for part in alike(lengths)]
        rows = [Rows([widened(part[0], x_PD)] if self.on_cpu else part, self.device) for part in parts]
        masks = [length_mask(part, x_PD, of_part.shape[1]) for part, of_part in zip(parts, rows, strict=True)]
        for layer in self.encoder_layers:
            attended_PD = self._attend_in_documents(layer.qkv(x_PD), rows, masks, [sum(part) for part in parts])
            x_PD = layer.norm.after(layer.out, attended_PD, x_PD)
            del attended_PD  # nothing of it is held beside the widest product
            x_PD = layer.feed_forward(x_PD)
        sources = [SourcePlaces(documents[run], None if self.on_cpu else self.device) for run in runs(documents)]
        tokens = [sum(lengths[run]) for run in runs(documents)]
        for index, (_, cross) in enumerate(self.decoder_layers):
            kv_P2HE = cross.kv(x_PD).view(len(x_PD), 2, self.heads, -1)
            split = torch.split(kv_P2HE[: sum(lengths)], tokens)
            for source, kv in zip(sources, split, strict=True):
                source.keep(index, kv)

    def _attend_in_documents(
        self, qkv_P3D: Tensor, rows: Sequence[Rows], masks: Sequence[Tensor | None], counts: Sequence[int]
    ) -> Tensor:
        """The encoder's self-attention, (P, D); the queries' place is taken by what comes out."""
        qkv = qkv_P3D.view(len(qkv_P3D), 3, self.encoder_heads, -1)
        start = 0
        for part, mask, count in zip(rows, masks, counts, strict=True):
            q, k, v = part.padded(qkv[start : start + part.count]).permute(2, 0, 3, 1, 4)
            qkv[start : start + count, 0] = part.packed(attend(q, k, v, mask).transpose(1, 2))[:count]
            start += count
        return qkv[:, 0].flatten(1)

    @torch.inference_mode()
    def extend(
        self,
        documents: Sequence[DocumentCache],
        tokens_R: Tensor,
        depths_R: Tensor,
        visible: Sequence[Tensor | None],
        *,
        kept: bool = True,
    ) -> Tensor:
        """Runs the decoder over M new nodes of each document's token tree.

        Args:
            documents: the rows of document i stand together, in this order.
            tokens_R, depths_R: token and depth (the root is 0) of each new node, documents one behind the other.
            visible: for each document (M, C + M) bool, which nodes each new node descends from, itself included;
                None where there is one, and it descends from all.
            kept: whether the nodes are appended to the cache; if not, C is 0 whatever the cache holds.

        Returns: final hidden states (R, D).
        """
        order = slot_order(documents)
        counts = [1 if mask is None else len(mask) for mask in visible]
        rows = None if order is None else row_order(order, counts).to(self.device)
        if order is not None and rows is not None:
            documents, visible = [documents[at] for at in order], [visible[at] for at in order]
            tokens_R, depths_R = tokens_R[rows], depths_R[rows]
        x_RD = self.decode(tokens_R, depths_R, Segments(documents, visible, kept=kept))
        if kept:
            for document, mask in zip(documents, visible, strict=True):
                document.size += 1 if mask is None else len(mask)
        return x_RD if rows is None else torch.empty_like(x_RD).index_copy_(0, rows, x_RD)

    def decode(self, tokens_R: Tensor, depths_R: Tensor, attention: Attention) -> Tensor:
        """The decoder's layers over rows that attend as `attention` lets them: (R, D)."""
        x_RD = self._embed(tokens_R, self.decoder_embed, depths_R, self.decoder_positions, self.decoder_norm)
        for index, (layer, cross) in enumerate(self.decoder_layers):
            attended = attention.attend_to_nodes(index, layer.qkv(x_RD).view(len(x_RD), 3, self.heads, -1))
            x_RD = layer.norm.after(layer.out, attended.flatten(1), x_RD)
            attended = attention.attend_to_source(index, cross.q(x_RD).view(len(x_RD), self.heads, -1))
            x_RD = cross.norm.after(cross.out, attended.flatten(1), x_RD)
            del attended
            x_RD = layer.feed_forward(x_RD)
        return x_RD

    @torch.inference_mode()
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """(R, V), in the generator's dtype; of int8 float32."""
        return self._head(hidden_RD)[:, : self.vocab_size]


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _at_once(most: int, numbers: int) -> int:
    return min(most, max(most // 4, int(CPU_MULTIPLICATIONS / numbers)))
