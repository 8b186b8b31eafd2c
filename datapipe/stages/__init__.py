"""The stages, one file each. They know no Ray, no path and no clock.

Their files import model libraries only where a stage is built, because every command that reads a recipe imports them.
"""

from __future__ import annotations

from datapipe.schema import StageName
from datapipe.stages.caption import CaptionSettings
from datapipe.stages.fetch import FetchSettings
from datapipe.stages.ground import GroundSettings
from datapipe.stages.screen import ScreenSettings
from datapipe.stages.segment import SegmentSettings
from datapipe.stages.select import SelectSettings
from datapipe.stages.stage import Phase, StageSettings
from datapipe.stages.tag import TagSettings
from subject_diffusion.settings import Settings


class StageBlocks(Settings):
    """The one list of stages: a row meets them in this order, and a recipe has a block for each."""

    fetch: FetchSettings = FetchSettings()
    screen: ScreenSettings = ScreenSettings()
    caption: CaptionSettings = CaptionSettings()
    tag: TagSettings = TagSettings()
    ground: GroundSettings = GroundSettings()
    segment: SegmentSettings = SegmentSettings()
    select: SelectSettings = SelectSettings()

    def stages(self) -> dict[StageName, StageSettings]:
        """The block of every stage, in order."""
        return {name: getattr(self, name.value) for name in STAGES}


STAGES = tuple(StageName(name) for name in StageBlocks.model_fields)


def stages_of_phase(phase: Phase) -> tuple[StageName, ...]:
    """The stages of one phase, in order."""
    return tuple(name for name, block in StageBlocks().stages().items() if block.phase == phase)


FETCH_STAGES = stages_of_phase("fetch")
ANNOTATE_STAGES = stages_of_phase("annotate")
