//! `cargo xtask device-test`: the tests that need a device besides the CPU.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, file_failure};
use crate::process::Process;
use crate::{below, no_arguments, target_folder};

/// Where Linux keeps the descriptions of Vulkan drivers.
const DRIVERS: &str = "/usr/share/vulkan/icd.d";

/// Builds with the feature `wgpu`, in a folder of its own so that the ordinary build stays as it
/// is, and compares the device with the CPU. Without a GPU the software device is chosen, if it is
/// installed; without any device the test says that it was skipped.
pub fn run(root: &Path, arguments: &[String]) -> Result<(), Failure> {
    no_arguments("device-test", arguments)?;
    let target = target_folder(root).join("device");
    let mut tests = Process::cargo(root)
        .args(["test", "--release", "--package", "tangent-cli"])
        .args(["--features", "wgpu", "--target-dir"])
        .args([below(root, &target)])
        .args(["--test", "it", "device::", "--", "--nocapture"]);
    if env::var_os("XDG_RUNTIME_DIR").is_none() {
        let folder = target.join("runtime");
        fs::create_dir_all(&folder).map_err(file_failure(&folder, "create"))?;
        tests = tests.env("XDG_RUNTIME_DIR", folder.to_string_lossy());
    }
    if needs_software_device() {
        match software_driver(Path::new(DRIVERS)) {
            Some(file) => tests = tests.env("VK_DRIVER_FILES", file.to_string_lossy()),
            None => eprintln!(
                "note: no GPU, and no software device in {DRIVERS}; Debian's package \
                 mesa-vulkan-drivers brings one"
            ),
        }
    }
    tests.run()
}

/// Whether nobody chose a driver and there is no GPU for one.
fn needs_software_device() -> bool {
    let is_chosen = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"]
        .iter()
        .any(|name| env::var_os(name).is_some());
    cfg!(target_os = "linux") && !is_chosen && !has_gpu(Path::new("/dev"))
}

/// Whether a kernel driver shows a GPU among the device files.
fn has_gpu(dev: &Path) -> bool {
    dev.join("nvidiactl").exists()
        || names(&dev.join("dri"))
            .iter()
            .any(|name| name.starts_with("renderD"))
}

/// Mesa's software driver, `lvp_icd.<architecture>.json`.
fn software_driver(folder: &Path) -> Option<PathBuf> {
    let name = names(folder)
        .into_iter()
        .filter(|name| name.starts_with("lvp_icd.") && name.ends_with(".json"))
        .min()?;
    Some(folder.join(name))
}

/// Names of what lies in a folder; none where it cannot be read.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_seen_by_their_device_files() {
        let dev = tempfile::tempdir().unwrap();
        assert!(!has_gpu(dev.path()));
        fs::create_dir(dev.path().join("dri")).unwrap();
        fs::write(dev.path().join("dri/card0"), "").unwrap();
        assert!(!has_gpu(dev.path()));
        fs::write(dev.path().join("dri/renderD128"), "").unwrap();
        assert!(has_gpu(dev.path()));
    }

    #[test]
    fn the_software_driver_is_found_among_others() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(software_driver(&folder.path().join("missing")), None);
        for name in ["intel_icd.x86_64.json", "lvp_icd.txt"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(software_driver(folder.path()), None);
        let file = folder.path().join("lvp_icd.x86_64.json");
        fs::write(&file, "").unwrap();
        assert_eq!(software_driver(folder.path()), Some(file));
    }
}
