"""NVIDIA's Hymba: parallel attention and Mamba in each layer, with memory tokens and shared keys and values.

Importing this package registers Hymba with transformers: AutoConfig and AutoModelForCausalLM then read a folder or hub
id with the released config.json and safetensors, without remote code. klfast's own loading functions import it when
they find one.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from klfast.models.hymba.cache import HymbaCache, state_bytes
from klfast.models.hymba.configuration import HymbaConfig
from klfast.models.hymba.modeling import HymbaForCausalLM, HymbaModel

AutoConfig.register("hymba", HymbaConfig, exist_ok=True)
AutoModelForCausalLM.register(HymbaConfig, HymbaForCausalLM, exist_ok=True)

__all__ = ["HymbaCache", "HymbaConfig", "HymbaForCausalLM", "HymbaModel", "state_bytes"]
