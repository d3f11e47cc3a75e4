"""How the routers spread tokens over the experts: counted on the device, per adapted layer, expert and task.

Plain PyTorch in one process; whoever has several ranks hands in the function that sums over them.
"""
