//! Devices by name: which ones this binary was built with, and whether the machine has them.

use std::any::Any;
use std::env;
use std::fmt;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use burn::tensor::Device;

use crate::failure::Failure;

/// Where a model's activations and trained tensors live and its operations run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// The CPU, with kernels of our own.
    Cpu,
    /// The system's first GPU, through WGSL shaders.
    Wgpu,
    /// The system's first GPU, through SPIR-V shaders.
    Vulkan,
    /// The first NVIDIA GPU.
    Cuda,
}

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DeviceError {
    /// It is none of this binary's features.
    #[error(
        "--device {device}: this binary was built without {device}; build with `cargo build \
         --release --features {device}`, or leave --device out to run on the CPU"
    )]
    NotBuilt {
        /// What was asked for.
        device: DeviceName,
    },
    /// The machine has none, or no driver for it.
    #[error(
        "--device {device}: none was found; looked for {}. Install {}, or leave --device out to \
         run on the CPU",
        .device.sought(),
        .device.remedy()
    )]
    NotFound {
        /// What was asked for.
        device: DeviceName,
    },
    /// It does not work.
    #[error(
        "--device {device} cannot be used: {reason}. Update its driver, try another --device, or \
         leave --device out to run on the CPU"
    )]
    Unusable {
        /// What was asked for.
        device: DeviceName,
        /// What the device or its driver answered, or how the process ended that tried it.
        reason: String,
    },
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Self {
        Self::Request(error.to_string())
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Wgpu => "wgpu",
            Self::Vulkan => "vulkan",
            Self::Cuda => "cuda",
        })
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "cpu" => Ok(Self::Cpu),
            "wgpu" => Ok(Self::Wgpu),
            "vulkan" => Ok(Self::Vulkan),
            "cuda" => Ok(Self::Cuda),
            other => Err(format!("\"{other}\" is not one of cpu, wgpu, vulkan, cuda")),
        }
    }
}

impl DeviceName {
    /// Opens the device and lets it add two numbers, so that one that cannot compute is refused
    /// here and not in the middle of a run. Drivers may crash: where there is one, another process
    /// opens the device first.
    ///
    /// # Errors
    /// If the binary was built without it, the machine has none, or it does not compute.
    pub fn open(self) -> Result<Device, DeviceError> {
        if !self.is_built() {
            return Err(DeviceError::NotBuilt { device: self });
        }
        if self != Self::Cpu {
            let tried = self.probe().and_then(outcome);
            tried.map_err(|reason| self.unusable(reason))?;
        }
        self.open_here()
    }

    /// [`open`](Self::open) in this process alone, which a crash of the driver ends.
    ///
    /// # Errors
    /// If the machine has none, or it does not compute.
    pub fn open_here(self) -> Result<Device, DeviceError> {
        let found = caught(|| self.find().map(|device| (one_plus_one(&device), device)));
        match found.map_err(|reason| self.unusable(reason))? {
            Some((2.0, device)) => Ok(device),
            Some((sum, _)) => Err(self.unusable(format!("1 + 1 gave {sum}"))),
            None => Err(DeviceError::NotFound { device: self }),
        }
    }

    fn unusable(self, reason: String) -> DeviceError {
        DeviceError::Unusable {
            device: self,
            reason,
        }
    }

    /// The hidden command of this binary that opens the device and ends.
    fn probe(self) -> Result<Command, String> {
        let mut command = Command::new(env::current_exe().map_err(not_started)?);
        command.args(["probe-device", &self.to_string()]);
        Ok(command)
    }

    /// Whether this binary was built with it.
    fn is_built(self) -> bool {
        match self {
            Self::Cpu => true,
            Self::Wgpu => cfg!(feature = "wgpu"),
            Self::Vulkan => cfg!(feature = "vulkan"),
            Self::Cuda => cfg!(feature = "cuda"),
        }
    }

    /// The device, if the machine has one. It is set up at its first use.
    fn find(self) -> Option<Device> {
        match self {
            Self::Cpu => Some(Device::flex()),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => exists(burn::tensor::DeviceType::Wgpu)
                .then(|| Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => exists(burn::tensor::DeviceType::Vulkan)
                .then(|| Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(feature = "cuda")]
            Self::Cuda => exists(burn::tensor::DeviceType::Cuda)
                .then(|| Device::cuda(burn::tensor::DeviceIndex::Default)),
            #[cfg(not(all(feature = "wgpu", feature = "vulkan", feature = "cuda")))]
            _ => None,
        }
    }

    /// What is looked for.
    fn sought(self) -> &'static str {
        match self {
            Self::Cpu => "a CPU",
            Self::Wgpu => {
                "a GPU with a driver for Vulkan, Metal, Direct3D 12 or OpenGL, or a software \
                 device with one"
            }
            Self::Vulkan => "a GPU with a driver for Vulkan, or a software device with one",
            Self::Cuda => "an NVIDIA GPU and its driver's libcuda",
        }
    }

    /// What to install where nothing is found.
    fn remedy(self) -> &'static str {
        match self {
            Self::Cpu => "nothing",
            Self::Wgpu | Self::Vulkan => {
                "the driver of your GPU (Debian: mesa-vulkan-drivers, which also brings a \
                 software device)"
            }
            Self::Cuda => "NVIDIA's driver (Debian: nvidia-driver)",
        }
    }
}

/// Whether the machine has a device of this kind.
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "cuda"))]
fn exists(kind: burn::tensor::DeviceType) -> bool {
    !Device::enumerate(kind).is_empty()
}

/// Runs a process that tries a device; the error says how it ended, if not well.
fn outcome(mut command: Command) -> Result<(), String> {
    let output = command.stdin(Stdio::null()).output().map_err(not_started)?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = errors.lines().map(str::trim).rfind(|line| !line.is_empty());
    let last = last.map_or(String::new(), |line| format!(", after \"{line}\""));
    let status = output.status;
    Err(format!("a process that tried it ended with {status}{last}"))
}

fn not_started(error: io::Error) -> String {
    format!("no process that tries it could be started ({error})")
}

/// 1 + 1, computed on the device.
fn one_plus_one(device: &Device) -> f32 {
    let one = tangent_ops::tensor(vec![1.0], 1, 1, device);
    let sum = tangent_ops::values(one.clone() + one);
    sum.first().copied().unwrap_or(f32::NAN)
}

/// Runs `work` and turns a panic, on whichever thread, into its message; nothing is printed.
/// Devices are set up on threads of their own, and report what goes wrong there by panicking.
fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let first = Arc::new(Mutex::new(None));
    let seen = first.clone();
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let mut seen = seen.lock().unwrap_or_else(|e| e.into_inner());
        seen.get_or_insert_with(|| message(info.payload()));
    }));
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    panic::set_hook(usual);
    result.map_err(|payload| {
        let first = first.lock().unwrap_or_else(|e| e.into_inner()).take();
        first.unwrap_or_else(|| message(&*payload))
    })
}

/// What a panic said.
fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no reason was given").to_owned()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use clap::Parser;

    use super::*;

    const ALL: [DeviceName; 4] = [
        DeviceName::Cpu,
        DeviceName::Wgpu,
        DeviceName::Vulkan,
        DeviceName::Cuda,
    ];

    #[test]
    fn names_are_read_as_they_are_written() {
        for device in ALL {
            assert_eq!(device.to_string().parse::<DeviceName>(), Ok(device));
        }
        let error = "gpu".parse::<DeviceName>().unwrap_err();
        for device in ALL {
            assert!(error.contains(&device.to_string()), "{error}");
        }
    }

    #[test]
    fn a_device_that_was_not_built_in_is_refused_with_the_remedy() {
        for device in ALL.into_iter().filter(|d| !d.is_built()) {
            let error = device.open().unwrap_err();
            assert_eq!(error, DeviceError::NotBuilt { device });
            let remedy = format!("cargo build --release --features {device}");
            assert!(error.to_string().contains(&remedy), "{error}");
        }
    }

    #[test]
    fn messages_say_what_was_looked_for_and_what_to_install() {
        let device = DeviceName::Wgpu;
        let text = DeviceError::NotFound { device }.to_string();
        for part in ["--device wgpu", "Vulkan", "mesa-vulkan-drivers"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn another_process_of_this_binary_tries_the_device() {
        for device in ALL {
            let command = device.probe().unwrap();
            let program = env::current_exe().unwrap();
            assert_eq!(command.get_program(), program.as_os_str());
            let name = device.to_string();
            let words: Vec<&OsStr> = command.get_args().collect();
            assert_eq!(words, ["probe-device", name.as_str()]);
            // The command line knows the command and takes the name.
            let line = [OsStr::new("tangent")].into_iter().chain(words);
            let parsed = crate::Cli::try_parse_from(line).unwrap();
            let command = parsed.command;
            assert!(matches!(command, crate::commands::Command::ProbeDevice(_)));
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_process_that_dies_makes_its_device_unusable() {
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            outcome(command)
        };
        assert_eq!(shell("echo noise >&2"), Ok(()));
        for (script, how) in [
            ("kill -SEGV $$", "ended with signal: 11 (SIGSEGV)"),
            (
                "echo lost >&2; exit 3",
                "ended with exit status: 3, after \"lost\"",
            ),
        ] {
            let error = DeviceName::Wgpu.unusable(shell(script).unwrap_err());
            let text = error.to_string();
            for part in [
                "--device wgpu cannot be used",
                how,
                "driver",
                "another --device",
            ] {
                assert!(text.contains(part), "no {part:?} in: {text}");
            }
        }
        let missing = outcome(Command::new("./no-such-program")).unwrap_err();
        assert!(missing.contains("could be started"), "{missing}");
    }

    // One test, since the hook that reports panics is the process's.
    #[test]
    fn the_cpu_opens_and_panics_become_messages() {
        assert_eq!(DeviceName::Cpu.open(), Ok(Device::flex()));
        assert_eq!(caught(|| 3), Ok(3));
        let here: Result<(), String> = caught(|| panic!("no {}", "adapter"));
        assert_eq!(here, Err("no adapter".to_owned()));
        let elsewhere: Result<(), String> = caught(|| {
            let thread = std::thread::spawn::<_, ()>(|| panic!("lost"));
            thread.join().unwrap();
        });
        assert_eq!(elsewhere, Err("lost".to_owned()));
    }
}
