"""Any model without a record of its own (Llama and its like among them): everything is found out from the model."""

from __future__ import annotations

from klfast.models.families.base import Family

FAMILY = Family(model_type="", widens_logits=True)
