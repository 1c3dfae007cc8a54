"""The device executor: step plans run with JAX on the devices of one replica."""

from serving.engine.device.build import BuildProgress, build_device_executor
from serving.engine.device.config import DeviceExecutorConfig
from serving.engine.device.executor import DeviceExecutor

__all__ = ["BuildProgress", "DeviceExecutor", "DeviceExecutorConfig", "build_device_executor"]
