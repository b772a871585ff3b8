"""BART as two functions: ``prefill`` encodes documents, ``extend`` runs the decoder over new nodes of token trees.

transformers supplies the weights; the arithmetic is that of ``models/bart/modeling_bart.py``, with three differences
that do not change it: documents are packed one behind the other instead of padded, the projections of queries, keys
and values are one product, and the decoder's rows of all documents and all questions go through each product together.

Shapes: P packed source tokens, R packed decoder rows, D model, H heads, E head, V vocabulary, L layers,
S tokens of one document, M new nodes of one document, C cached nodes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu, layer_norm, linear, scaled_dot_product_attention
from transformers import BartForConditionalGeneration
from transformers.activations import GELUActivation

from generator_svc.engine.cache import DocumentCache, OnePass

# Documents that go through the encoder together, on a CPU: enough rows for the products to be at their fastest, few
# enough that intermediate results stay in caches and in memory that malloc reuses rather than maps anew each time. A
# batch of 4240 tokens took 2.63 s at once, 2.38 in groups of 1024, 2.52 in groups of 512 (BART-base, float32).
CPU_PREFILL_TOKENS = 1024
POSITION_OFFSET = 2  # BartLearnedPositionalEmbedding keeps two rows that nobody uses


# torch multiplies float32 on the CPU with MKL, which reads a weight at a third of the memory's speed where a decode
# step brings it a few rows. oneDNN's product, which torch.compile uses, took half the time or less for 1 to 20 rows and
# 5 to 35 % less beyond, and it can apply the GELU as it writes. (Measured on two AVX-512 cores, 768 wide.)
_ONEDNN: Any = torch.ops.mkldnn._linear_pointwise if torch._C._has_mkldnn else None
_ONEDNN_DTYPES = [torch.float32] if _ONEDNN is not None else []
if _ONEDNN is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _ONEDNN_DTYPES.append(torch.bfloat16)


class Affine(NamedTuple):
    weight: Tensor
    bias: Tensor
    gelu: bool = False
    """Whether the exact GELU follows."""

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype in _ONEDNN_DTYPES:
            product: Tensor = _ONEDNN(x, self.weight, self.bias, "gelu" if self.gelu else "none", [], "none")
            return product
        product = linear(x, self.weight, self.bias)
        return gelu(product) if self.gelu else product


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Block(NamedTuple):
    """What encoder and decoder layers have in common: self-attention and the feed-forward network."""

    qkv: Affine
    out: Affine
    norm: Norm
    fc1: Affine
    activation: Callable[[Tensor], Tensor] | None  # None: fc1's own GELU
    fc2: Affine
    final_norm: Norm

    def feed_forward(self, x: Tensor) -> Tensor:
        inner = self.fc1(x)
        inner = inner if self.activation is None else self.activation(inner)
        return self.final_norm(x + self.fc2(inner))


class CrossAttention(NamedTuple):
    q: Affine
    kv: Affine
    out: Affine
    norm: Norm


def _affine(*modules: nn.Linear) -> Affine:
    """Stacks linear maps of one input into one; the modules keep views of it, so that no weight is held twice."""
    weight = torch.cat([m.weight.data for m in modules]) if len(modules) > 1 else modules[0].weight.data
    bias = torch.cat([m.bias.data for m in modules]) if len(modules) > 1 else modules[0].bias.data
    if len(modules) > 1:
        for module, w, b in zip(modules, weight.chunk(len(modules)), bias.chunk(len(modules)), strict=True):
            module.weight.data, module.bias.data = w, b
    return Affine(weight, bias)


def _attend(q_HME: Tensor, k_HCE: Tensor, v_HCE: Tensor, visible_MC: Tensor | None) -> Tensor:
    """Attention of one document's rows, (H, M, E)."""
    if visible_MC is None and q_HME.shape[1] == 1 and q_HME.device.type == "cpu" and q_HME.dtype == torch.bfloat16:
        # For a single row torch's bfloat16 kernel takes twice as long as the products by themselves.
        weights_HMC = (torch.bmm(q_HME, k_HCE.transpose(1, 2)).float() * q_HME.shape[2] ** -0.5).softmax(-1)
        return torch.bmm(weights_HMC.to(q_HME.dtype), v_HCE)
    return scaled_dot_product_attention(q_HME[None], k_HCE[None], v_HCE[None], attn_mask=visible_MC)[0]


def _in_groups(contexts: Sequence[Tensor], tokens: int) -> Iterator[Sequence[Tensor]]:
    """Neighbours of at most `tokens` tokens together, but one context at least."""
    start = held = 0
    for at, context in enumerate(contexts):
        if held and held + len(context) > tokens:
            yield contexts[start:at]
            start, held = at, 0
        held += len(context)
    yield contexts[start:]


def _norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight.data, module.bias.data, module.eps)


def _block(module: Any) -> Block:
    attention = module.self_attn
    has_gelu = type(module.activation_fn) is GELUActivation
    return Block(
        qkv=_affine(attention.q_proj, attention.k_proj, attention.v_proj),
        out=_affine(attention.out_proj),
        norm=_norm(module.self_attn_layer_norm),
        fc1=_affine(module.fc1)._replace(gelu=has_gelu),
        activation=None if has_gelu else module.activation_fn,
        fc2=_affine(module.fc2),
        final_norm=_norm(module.final_layer_norm),
    )


def _cross_attention(module: Any) -> CrossAttention:
    attention = module.encoder_attn
    return CrossAttention(
        q=_affine(attention.q_proj),
        kv=_affine(attention.k_proj, attention.v_proj),
        out=_affine(attention.out_proj),
        norm=_norm(module.encoder_attn_layer_norm),
    )


class Bart:
    """The two halves of a ``BartForConditionalGeneration``, on its device and in its dtype."""

    def __init__(self, model: BartForConditionalGeneration) -> None:
        config: Any = model.config
        encoder, decoder = model.model.encoder, model.model.decoder
        self.heads = int(config.decoder_attention_heads)
        self.encoder_heads = int(config.encoder_attention_heads)
        self.dtype, self.device = model.dtype, model.device
        # one table for all, unless the configuration unties them
        self.encoder_embed = encoder.embed_tokens.weight.data
        self.decoder_embed = decoder.embed_tokens.weight.data
        self.embed_scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.encoder_positions = encoder.embed_positions.weight.data
        self.decoder_positions = decoder.embed_positions.weight.data
        self.encoder_norm = _norm(encoder.layernorm_embedding)
        self.decoder_norm = _norm(decoder.layernorm_embedding)
        self.encoder_layers = [_block(m) for m in encoder.layers]
        self.decoder_layers = [(_block(m), _cross_attention(m)) for m in decoder.layers]
        self.head = Affine(model.lm_head.weight.data, model.final_logits_bias.data[0].to(self.dtype))

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    def _embed(self, ids: Tensor, words: Tensor, positions: Tensor, table: Tensor, norm: Norm) -> Tensor:
        x = embedding(ids, words)
        if self.embed_scale != 1.0:
            x = x * self.embed_scale
        return norm(x + embedding(positions + POSITION_OFFSET, table))

    @torch.inference_mode()
    def prefill(self, contexts: Sequence[Tensor], node_capacity: int) -> list[DocumentCache]:
        """Encodes documents and computes the cross-attention keys and values of every layer, once.

        Args:
            contexts: token ids of each document, (S,) without padding.
            node_capacity: decoder nodes that each document's cache should have room for at first.
        """
        if self.device.type != "cpu":
            return self._prefill(contexts, node_capacity)
        caches: list[DocumentCache] = []
        for together in _in_groups(contexts, CPU_PREFILL_TOKENS):
            caches += self._prefill(together, node_capacity)
        return caches

    def _prefill(self, contexts: Sequence[Tensor], node_capacity: int) -> list[DocumentCache]:
        lengths = [len(c) for c in contexts]
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        tokens = torch.cat(list(contexts))
        x_PD = self._embed(tokens, self.encoder_embed, positions, self.encoder_positions, self.encoder_norm)
        for layer in self.encoder_layers:
            qkv = layer.qkv(x_PD).view(len(x_PD), 3, self.encoder_heads, -1)
            attended = torch.empty_like(x_PD)
            start = 0
            for n in lengths:
                q, k, v = qkv[start : start + n].permute(1, 2, 0, 3).unsqueeze(1)  # each [1, H, S, E]
                out = scaled_dot_product_attention(q, k, v)
                attended[start : start + n].view(n, self.encoder_heads, -1).copy_(out[0].transpose(0, 1))
                start += n
            x_PD = layer.norm(x_PD + layer.out(attended))
            x_PD = layer.feed_forward(x_PD)
        caches = [
            DocumentCache(
                layers=len(self.decoder_layers),
                heads=self.heads,
                head_dim=self.decoder_embed.shape[1] // self.heads,
                capacity=node_capacity,
                dtype=self.dtype,
                device=self.device,
            )
            for _ in lengths
        ]
        for _, cross in self.decoder_layers:
            kv = cross.kv(x_PD).view(len(x_PD), 2, self.heads, -1).permute(1, 2, 0, 3).contiguous()  # [2,H,P,E]
            start = 0
            for cache, n in zip(caches, lengths, strict=True):
                cache.cross.append(kv[:, :, start : start + n])
                start += n
        return caches

    @torch.inference_mode()
    def extend(
        self,
        caches: Sequence[DocumentCache | OnePass],
        tokens_R: Tensor,
        depths_R: Tensor,
        visible: Sequence[Tensor | None],
    ) -> Tensor:
        """Runs the decoder over M new nodes of each document's token tree and appends them to its cache.

        Args:
            caches: one a document; the rows of document i stand together, in this order.
            tokens_R, depths_R: token and depth (the root is 0) of each new node, documents one behind the other.
            visible: for each document (M, C + M) bool, which nodes each new node descends from, itself included;
                None where it is all of them.

        Returns: final hidden states (R, D).
        """
        x_RD = self._embed(tokens_R, self.decoder_embed, depths_R, self.decoder_positions, self.decoder_norm)
        counts = [1 if v is None else v.shape[0] for v in visible]
        for index, (layer, cross) in enumerate(self.decoder_layers):
            qkv = layer.qkv(x_RD).view(len(x_RD), 3, self.heads, -1)
            attended = torch.empty_like(x_RD)
            by_head = attended.view(len(x_RD), self.heads, -1)
            start = 0
            for cache, n, mask in zip(caches, counts, visible, strict=True):
                q, k, v = qkv[start : start + n].permute(1, 2, 0, 3)
                keys, values = cache.append(index, k, v)
                out = _attend(q, keys, values, mask)
                by_head[start : start + n].copy_(out.transpose(0, 1))
                start += n
            x_RD = layer.norm(x_RD + layer.out(attended))
            q_RHE = cross.q(x_RD).view(len(x_RD), self.heads, -1)
            start = 0
            for cache, n in zip(caches, counts, strict=True):
                k, v = cache.cross[index]
                out = _attend(q_RHE[start : start + n].transpose(0, 1), k, v, None)
                by_head[start : start + n].copy_(out.transpose(0, 1))
                start += n
            x_RD = cross.norm(x_RD + cross.out(attended))
            x_RD = layer.feed_forward(x_RD)
        for cache, n in zip(caches, counts, strict=True):
            cache.size += n
        return x_RD

    @torch.inference_mode()
    def logits(self, hidden_RD: Tensor) -> Tensor:
        """(R, V) float32."""
        return self.head(hidden_RD).float()
