"""TensorBoard and W&B through DeepSpeed's monitor, beside the engine: the engine's own events would log the loss
already divided by the global token count, which nobody wants to read."""

import numpy as np
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster


def open_monitor(report_to: list[str], output_dir: str) -> MonitorMaster:
    """A monitor whose write_events([(name, value, step), ...]) writes on rank 0.

    Args:
        report_to: any of tensorboard, wandb, none.
        output_dir: TensorBoard's files go to the folder ``tensorboard`` in it.
    """
    blocks = {}
    if "tensorboard" in report_to:
        blocks["tensorboard"] = {"enabled": True, "output_path": output_dir, "job_name": "tensorboard"}
    if "wandb" in report_to:
        blocks["wandb"] = {"enabled": True, "project": "comol_ds"}
    return MonitorMaster(get_monitor_config(blocks))


def write_image(monitor: MonitorMaster, name: str, image: np.ndarray, step: int) -> None:
    """A picture [rows, columns, 3] uint8 to TensorBoard and W&B, where they are open; events alone are numbers."""
    if monitor.tb_monitor is not None:
        monitor.tb_monitor.summary_writer.add_image(name, image, step, dataformats="HWC")
    if monitor.wandb_monitor is not None:
        import wandb  # an extra

        monitor.wandb_monitor.log({name: wandb.Image(image)}, step=step)
