//! The Python that some chores need: a virtual environment with pinned packages.

use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, file_failure};
use crate::process::Process;
use crate::target_folder;

/// The interpreter of the virtual environment `name` in cargo's target folder, with the packages
/// of the file `requirements`; made if it is missing or the file has changed.
pub fn environment(root: &Path, name: &str, requirements: &Path) -> Result<PathBuf, Failure> {
    let wanted = fs::read(requirements).map_err(file_failure(requirements, "read"))?;
    let environment = target_folder(root).join(name);
    let python = environment.join("bin/python");
    // Written after the packages are in, so that an interrupted installation is done again.
    let installed = environment.join("installed-requirements.txt");
    if python.exists() && fs::read(&installed).is_ok_and(|content| content == wanted) {
        return Ok(python);
    }
    Process::new(root, "python3", "python3")
        .args(["-m", "venv"])
        .args([environment.to_string_lossy()])
        .run()?;
    Process::new(root, &python, &python.to_string_lossy())
        .args(["-m", "pip", "install", "--quiet", "--requirement"])
        .args([requirements.to_string_lossy()])
        .run()?;
    fs::write(&installed, wanted).map_err(file_failure(&installed, "write"))?;
    Ok(python)
}
