"""The nodes of DMD One-Step. The only Python of the pack that imports ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .class_label import DMDClassLabel
from .compare import DMDCompare
from .distil import DMDContinueRun, DMDDistill
from .load import LoadDMDCheckpoint, LoadDMDLoRA
from .model_files import register_students
from .prompts import DMDPrompts
from .real_images import DMDRealImages
from .routes import register_routes
from .sampling import DMDEmptyLatent, DMDModelSampling, DMDOneStepSampler
from .save_student import DMDSaveStudent
from .teacher_pairs import DMDTeacherPairs

register_students()
register_routes()


class DMDOneStep(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadDMDCheckpoint,
            LoadDMDLoRA,
            DMDModelSampling,
            DMDOneStepSampler,
            DMDEmptyLatent,
            DMDClassLabel,
            DMDCompare,
            DMDSaveStudent,
            DMDPrompts,
            DMDTeacherPairs,
            DMDRealImages,
            DMDDistill,
            DMDContinueRun,
        ]
