"""VILA-U (arXiv 2409.04429): one language model that reads and writes text and pictures.

vision tower → codes → projector ┐
text tokens → embedding table ───┴→ language model → text head, or depth transformer → codes
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gesso_core.models.vila_u.config import VilaUConfig
from gesso_core.models.vila_u.depth_transformer import DepthTransformer
from gesso_core.models.vila_u.packing import block_diagonal_mask
from gesso_core.models.vila_u.projector import Projector
from gesso_core.models.vila_u.rows import RowRunner, padded_rows, use_row_attention
from gesso_core.models.vila_u.splice import Batch, Row
from gesso_core.models.vila_u.vision_tower import VisionTower

# B rows   L tokens   S width of the states   D codes of a position   C width of a code vector
# N positions of pictures   M text tokens   V vocabulary


class VilaU(nn.Module):
    """The parts, and the two directions between tokens and vectors."""

    def __init__(
        self,
        config: VilaUConfig,
        tower: VisionTower,
        projector: Projector,
        depth_transformer: DepthTransformer,
        llm: PreTrainedModel,
    ) -> None:
        """Put a model together.

        Args:
            config: of the whole.
            tower: sees and paints.
            projector: code vectors → embeddings of the language model.
            depth_transformer: states → codes.
            llm: a causal language model of transformers; its attention is replaced by one that
                works with `rows`, its weights and names stay.
        """
        super().__init__()
        self.config = config
        self.tower = tower
        self.projector = projector
        self.depth_transformer = depth_transformer
        self.llm = llm
        use_row_attention(llm)
        self.rows = RowRunner(llm)

    def embed_text(self, ids: Tensor) -> Tensor:
        """Embeddings (…, S) of token ids."""
        embeddings: Tensor = self.rows.table(ids)
        return embeddings

    def embed_codes(self, codes_ND: Tensor) -> Tensor:
        """Embeddings (N, S) of visual tokens: the projected sum of their code vectors."""
        features_NC = padded_rows(self.tower.embed(codes_ND))
        return self.embed_features(features_NC)[: len(codes_ND)]

    def embed_features(self, features_NC: Tensor) -> Tensor:
        """Embeddings (N, S) of visual features."""
        embeddings: Tensor = self.projector(features_NC.to(self.dtype))
        return embeddings

    def embed_row(self, row: Row) -> Tensor:
        """Embeddings (L, S) of text and visual tokens."""
        return self._embed(row.ids_L.to(self.device), row.codes_LD.to(self.device))

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings (B, L, S) of text and visual tokens together; zeros at padding."""
        return self._embed(batch.ids_BL, batch.codes_BLD) * batch.mask_BL[..., None]

    def states(self, batch: Batch) -> Tensor:
        """States (B, L, S) behind the final norm; packed rows do not see each other."""
        segments_BL = batch.mask_BL.long() if batch.segments_BL is None else batch.segments_BL
        output = self.rows.decoder(
            inputs_embeds=self.embed(batch),
            attention_mask=block_diagonal_mask(segments_BL),
            position_ids=batch.positions_BL.clamp(min=0),
            use_cache=False,
        )
        states_BLS: Tensor = output.last_hidden_state
        return states_BLS

    def text_logits(self, states_MS: Tensor) -> Tensor:
        """Logits (…, V) of the next text token."""
        logits_MV: Tensor = self.rows.head(states_MS)
        return logits_MV

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the language model."""
        parameter: nn.Parameter = next(self.llm.parameters())
        return parameter.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        parameter: nn.Parameter = next(self.llm.parameters())
        return parameter.device

    def _embed(self, ids: Tensor, codes: Tensor) -> Tensor:
        """Ids (…, L) and codes (…, L, D) → (…, L, S)."""
        visual = codes[..., 0] >= 0
        embeddings = self.embed_text(ids)
        if bool(visual.any()):
            visual_NS = self.embed_codes(codes[visual]).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(visual[..., None], visual_NS)
        return embeddings
