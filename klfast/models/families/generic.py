"""Any model without its own record, such as Phi: everything is detected from the model."""

from __future__ import annotations

from klfast.models.families.base import Family

FAMILY = Family(model_type="", widens_logits=True)
