"""What one device holds of a model: embeddings (mapped, not loaded), its share of the layers, the final norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from isthmus.inference.kernels import ACTIVATIONS, load_kernels
from isthmus.inference.layer import Layer, Norm, Rotation
from isthmus.models.shards import ShardReader
from isthmus.planning.block_layout import BlockPart
from isthmus.planning.pieces import Piece
from isthmus.spec.transformer import LayerShare, Range


class LocalModel:
    """``layers`` are those of ``layer_range``, in order. Of a decoupled model ``originals`` has, by number, the layers
    that are whole, as far as this device has a part of them, and ``blocks`` this device's sub-blocks of the others.
    Rows of the tables are read from the checkpoint when they are looked up."""

    def __init__(
        self,
        reader: ShardReader,
        share: LayerShare,
        dtype: str,
        *,
        layer_range: Range | None = None,
        block_part: BlockPart | None = None,
        original_shares: Mapping[int, LayerShare | None] | None = None,
        known: dict[Piece, Layer] | None = None,
        kept: Mapping[Piece, tuple[Piece, ...]] | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """Reads this device's ``share`` of each layer, in ``dtype`` (see ``linear``), and its ``block_part`` of
        decoupled ones, None: all of them. ``original_shares``: of a decoupled model's original layers other shares than
        ``share``, by number; None is no part. What ``known`` has is not read again; what is read is added to it.
        ``kept``: of which parts pieces consist that are not read as a whole. ``progress`` gets 0 to 1."""
        self.spec = reader.spec
        self.share = share
        self.dtype = dtype
        self._embedding_norm = Norm(reader, "embedding_norm") if reader.has("embedding_norm.weight") else None
        self.final_norm = Norm(reader, "final_norm") if reader.has("final_norm.weight") else None
        self._inverse_frequencies, self._rotary_scale = _rotary(reader)
        self.layer_range = Range(start=0, stop=self.spec.num_layers) if layer_range is None else layer_range
        self.kernels = load_kernels() if self.spec.is_decoder and self.spec.activation in ACTIVATIONS else None
        """For tokens that come one by one; None: by PyTorch."""
        form = self.spec.decoupling
        if block_part is None:
            block_part = BlockPart.alone(Range(start=0, stop=0 if form is None else form.num_sub_blocks))
        held = block_part.held(self.spec)
        self.sub_blocks = [block for block, _ in held]
        self.original_shares = dict(original_shares or {})
        self._known = {} if known is None else known
        kept = kept or {}
        self.originals: dict[int, Layer] = {}
        self.blocks: dict[int, list[Layer]] = {}
        for number in range(self.layer_range.start, self.layer_range.stop):
            if self.spec.is_decoupled(number):
                self.blocks[number] = [
                    self._layer(reader, Piece.of_sub_block(number, block, own, dtype), kept) for block, own in held
                ]
            elif (own := self.original_shares.get(number, share)) is not None:
                self.originals[number] = self._layer(reader, Piece.of_layer(number, own, dtype), kept)
            reader.release()
            progress((number + 1 - self.layer_range.start) / len(self.layer_range))
        self.layers = list(self.originals.values())
        self._tables = {
            name: reader.table(f"{name}.weight")
            for name in ("token", "position", "type")
            if reader.has(f"{name}.weight")
        }

    @property
    def num_bytes(self) -> int:
        """Of the matrices."""
        blocks = (block for blocks in self.blocks.values() for block in blocks)
        return sum(layer.num_bytes for layer in (*self.layers, *blocks))

    def _layer(self, reader: ShardReader, piece: Piece, kept: Mapping[Piece, tuple[Piece, ...]]) -> Layer:
        share = LayerShare(heads=piece.heads, columns=piece.columns, vocabulary=self.share.vocabulary)
        parts = kept.get(piece, (piece,))
        if parts != (piece,):
            return Layer.joined(share, [self._layer(reader, part, {}) for part in parts])
        if piece not in self._known:
            self._known[piece] = Layer(reader, piece.layer, share, piece.dtype, self.kernels, sub_block=piece.sub_block)
        return self._known[piece]

    def embed(self, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Hidden states (B, T, H), FP32, before the first layer."""
        hidden_BTH = F.embedding(ids_BT, self._tables["token"]).float()
        if "position" in self._tables:
            hidden_BTH = hidden_BTH + F.embedding(positions_BT + self.spec.position_offset, self._tables["position"])
        if "type" in self._tables:
            hidden_BTH = hidden_BTH + self._tables["type"][0]
        return hidden_BTH if self._embedding_norm is None else self._embedding_norm(hidden_BTH)

    def rotation(self, positions_BT: Tensor) -> Rotation | None:
        """The rotary angles at these positions; None for a model without."""
        if self._inverse_frequencies is None:
            return None
        angles_BTD = positions_BT[..., None].float() * torch.cat((self._inverse_frequencies, self._inverse_frequencies))
        angles_B1TD = angles_BTD[:, None]
        return Rotation(cos=angles_B1TD.cos() * self._rotary_scale, sin=angles_B1TD.sin() * self._rotary_scale)

    def rotary_table(self, num_positions: int) -> tuple[Tensor, Tensor] | None:
        """cos (T, D), and sin with a negative first half, of positions 0 to T - 1; None for a model without."""
        rotation = self.rotation(torch.arange(num_positions)[None])
        if rotation is None:
            return None
        cos_TD, (first_TD, second_TD) = rotation.cos[0, 0], rotation.sin[0, 0].chunk(2, dim=-1)
        return cos_TD.contiguous(), torch.cat((-first_TD, second_TD), dim=-1)


def _rotary(reader: ShardReader) -> tuple[Tensor | None, float]:
    """Inverse frequencies (D/2,) and the factor of cos and sin, by whatever rule the configuration names."""
    if not reader.spec.has_rotary:
        return None, 1.0
    config = reader.config
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, reader.spec.head_size, 2, dtype=torch.int64).float() / reader.spec.head_size
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, scale
