"""CoMoL (token-routed mixture of LoRA core experts, arXiv 2603.00573) as a PEFT tuner, trained under DeepSpeed.

Importing this package registers the adapter type COMOL with PEFT and nothing else: DeepSpeed is imported only by
`comol_ds.parallel` and the training loop.
"""

from comol_ds.adapters.config import CoMoLConfig
from comol_ds.adapters.tuner import CoMoLModel
from comol_ds.router_load.tracking import track_router_load
from comol_ds.serving.inference import load_for_inference

__version__ = "0.1.0"

__all__ = ["CoMoLConfig", "CoMoLModel", "__version__", "load_for_inference", "track_router_load"]
