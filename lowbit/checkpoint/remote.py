"""The headers of a repository on the Hub, read by HTTP range requests: what a plan needs, without a download."""

from pathlib import Path

from lowbit.checkpoint.layout import DTYPES, TensorInfo
from lowbit.checkpoint.reader import quantization_in, read_config
from lowbit.errors import InputError, first_line


class RemoteHeaders:
    """config and tensors of a repository, as `CheckpointReader` has them of a folder. files: where config.json is.

    Raises InputError where the repository cannot be reached or has no safetensors weights.
    """

    def __init__(self, repository: str, revision: str | None = None):
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError

        self.folder = Path(repository)  # for messages
        try:
            path = Path(hf_hub_download(repository, "config.json", revision=revision))
            self.config, self.files = read_config(path.parent), path.parent
            metadata = HfApi().get_safetensors_metadata(repository, revision=revision)
        except NotASafetensorsRepoError:
            raise InputError(f"{repository} has no safetensors weights: expected them on the Hub") from None
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            raise InputError(f"cannot read the headers of {repository}: {first_line(error)}") from None
        self.tensors: dict[str, TensorInfo] = {}
        for file in metadata.files_metadata.values():
            for name, tensor in file.tensors.items():
                if tensor.dtype not in DTYPES:
                    raise InputError(f"{name} has dtype {tensor.dtype}; expected one of {', '.join(DTYPES)}")
                self.tensors[name] = TensorInfo(name, DTYPES[tensor.dtype], tuple(tensor.shape))

    left_out = ()  # see `CheckpointReader`

    @property
    def quantization_config(self):
        """How the repository says that it is quantized, None where it does not."""
        return quantization_in(self.config)
