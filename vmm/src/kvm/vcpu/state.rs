//! The states of a vCPU and the steps between them.

use std::fmt;

/// Where a vCPU is in its life.
///
/// ```text
/// Created --start--> Paused --resume--> Running
///                      ^                   |
///                      +---pause or park---+
/// any but Created --stop--> Stopped
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It has no thread yet.
    Created,
    /// Its thread waits for commands; between two guest instructions.
    Paused,
    /// Its thread is in KVM_RUN, handles an exit, or waits for an interrupt.
    Running,
    /// Its thread has ended.
    Stopped,
}

/// What can happen to a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Its thread is started.
    Start,
    /// It is let run.
    Resume,
    /// It is told to pause; a vCPU that has just parked itself may be told so, too.
    Pause,
    /// It has parked itself, for a reason that it says.
    Park,
    /// Its registers are read.
    Inspect,
    /// All that it is is read.
    Save,
    /// It becomes what was saved.
    Restore,
    /// Single-stepping is switched on or off.
    Debug,
    /// It ends.
    Stop,
}

/// A step that the state does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{step}\" while {state}")]
pub struct IllegalStep {
    /// The state.
    pub state: State,
    /// The step.
    pub step: Step,
}

impl State {
    /// The state that `step` leads to.
    ///
    /// # Errors
    /// A step that this state does not allow.
    pub fn after(self, step: Step) -> Result<Self, IllegalStep> {
        match (self, step) {
            (Self::Created, Step::Start)
            | (Self::Paused | Self::Running, Step::Pause | Step::Park)
            | (Self::Paused, Step::Inspect | Step::Save | Step::Restore | Step::Debug) => {
                Ok(Self::Paused)
            }
            (Self::Paused, Step::Resume) => Ok(Self::Running),
            (Self::Paused | Self::Running | Self::Stopped, Step::Stop) => Ok(Self::Stopped),
            (state, step) => Err(IllegalStep { state, step }),
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Paused => "paused",
            Self::Running => "running",
            Self::Stopped => "stopped",
        })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::Resume => "resume",
            Self::Pause => "pause",
            Self::Park => "park",
            Self::Inspect => "inspect",
            Self::Save => "save",
            Self::Restore => "restore",
            Self::Debug => "single-step",
            Self::Stop => "stop",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 4] = [
        State::Created,
        State::Paused,
        State::Running,
        State::Stopped,
    ];
    const STEPS: [Step; 9] = [
        Step::Start,
        Step::Resume,
        Step::Pause,
        Step::Park,
        Step::Inspect,
        Step::Save,
        Step::Restore,
        Step::Debug,
        Step::Stop,
    ];

    #[test]
    fn exactly_the_drawn_steps_are_legal() {
        let legal = [
            (State::Created, Step::Start, State::Paused),
            (State::Paused, Step::Resume, State::Running),
            (State::Paused, Step::Pause, State::Paused),
            (State::Paused, Step::Park, State::Paused),
            (State::Paused, Step::Inspect, State::Paused),
            (State::Paused, Step::Save, State::Paused),
            (State::Paused, Step::Restore, State::Paused),
            (State::Paused, Step::Debug, State::Paused),
            (State::Paused, Step::Stop, State::Stopped),
            (State::Running, Step::Pause, State::Paused),
            (State::Running, Step::Park, State::Paused),
            (State::Running, Step::Stop, State::Stopped),
            (State::Stopped, Step::Stop, State::Stopped),
        ];
        for state in STATES {
            for step in STEPS {
                let expected = legal
                    .iter()
                    .find(|(from, by, _)| (*from, *by) == (state, step))
                    .map(|(_, _, to)| *to);
                assert_eq!(state.after(step).ok(), expected, "{step} while {state}");
            }
        }
    }

    #[test]
    fn an_illegal_step_names_both() {
        let error = State::Running.after(Step::Resume).unwrap_err();
        assert_eq!(error.to_string(), "\"resume\" while running");
    }
}
