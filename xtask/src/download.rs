//! HTTP downloads: the system's certificates, progress on stderr, checksums, rename into place.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use sha2::{Digest, Sha256};
use ureq::http::Response;
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use crate::failure::{Failure, file_failure};

/// How long a server may stay silent once it has been reached.
const SILENCE: Duration = Duration::from_secs(60);
/// Downloads below this many bytes show no progress.
const WORTH_SHOWING: u64 = 1_000_000;

/// A client that trusts what the system trusts, uses the proxy of the environment and gives up on
/// a server that cannot be reached within `connect`.
pub fn agent(connect: Duration) -> Agent {
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::PlatformVerifier)
        .build();
    Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .timeout_resolve(Some(connect))
        .timeout_connect(Some(connect))
        .timeout_recv_response(Some(SILENCE))
        .timeout_per_read(Some(SILENCE))
        .build()
        .new_agent()
}

/// Requests `url`, following redirects; any status other than success is a [`Failure::Status`].
pub fn get(
    agent: &Agent,
    url: &str,
    headers: &[(&str, String)],
) -> Result<Response<Body>, Failure> {
    let mut request = agent.get(url);
    for (name, value) in headers {
        request = request.header(*name, value.as_str());
    }
    let response = request.call().map_err(|error| Failure::Download {
        url: url.to_owned(),
        reason: error.to_string(),
    })?;
    if !response.status().is_success() {
        return Err(Failure::Status {
            url: url.to_owned(),
            status: response.status().as_u16(),
        });
    }
    Ok(response)
}

/// Writes the body of `response` to `path`, synced, and returns its sha256.
pub fn save(response: Response<Body>, url: &str, path: &Path) -> Result<String, Failure> {
    let label = path.file_name().unwrap_or_default().to_string_lossy();
    let mut progress = Progress::new(url, response.body().content_length());
    let mut body = response.into_body().into_reader();
    let mut file = File::create(path).map_err(file_failure(path, "create"))?;
    let sha256 = copy(&mut body, &mut file, |bytes| progress.show(bytes)).map_err(|error| {
        Failure::Download {
            url: url.to_owned(),
            reason: format!("stopped while {label} was written: {error}"),
        }
    })?;
    file.sync_all().map_err(file_failure(path, "write"))?;
    Ok(sha256)
}

/// Copies everything and returns its sha256 in lower-case hex; `seen` gets the bytes so far.
pub fn copy(
    from: &mut impl Read,
    to: &mut impl Write,
    mut seen: impl FnMut(u64),
) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut total = 0;
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let part = buffer.get(..count).unwrap_or(&buffer);
        hasher.update(part);
        to.write_all(part)?;
        total += count as u64;
        seen(total);
    }
    Ok(hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// The sha256 of a file, in lower-case hex.
pub fn sha256_of(path: &Path) -> Result<String, Failure> {
    let mut file = File::open(path).map_err(file_failure(path, "open"))?;
    copy(&mut file, &mut io::sink(), |_| ()).map_err(file_failure(path, "read"))
}

/// A file or folder under a temporary name beside its target; removed unless it was moved there.
pub struct Temporary {
    path: PathBuf,
}

impl Temporary {
    /// Reserves a name for this process beside `target`; nothing is created.
    pub fn beside(target: &Path) -> Self {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        Self {
            path: target.with_file_name(format!(".{name}.{}.part", process::id())),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Renames to `target`, in place of what may be there.
    pub fn move_to(self, target: &Path) -> Result<(), Failure> {
        if target.is_dir() {
            fs::remove_dir_all(target).map_err(file_failure(target, "replace"))?;
        }
        fs::rename(&self.path, target).map_err(file_failure(target, "write"))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Best effort: there is nobody left to tell, and after a move nothing is there.
        let _ = if self.path.is_dir() {
            fs::remove_dir_all(&self.path)
        } else {
            fs::remove_file(&self.path)
        };
    }
}

/// Per cent of a download: one line rewritten on a terminal, a line every quarter elsewhere.
struct Progress<'a> {
    label: &'a str,
    total: Option<u64>,
    terminal: bool,
    next_percent: u64,
}

impl<'a> Progress<'a> {
    fn new(url: &'a str, total: Option<u64>) -> Self {
        let terminal = io::stderr().is_terminal();
        Self {
            label: url.rsplit('/').next().unwrap_or(url),
            total: total.filter(|bytes| *bytes >= WORTH_SHOWING),
            terminal,
            next_percent: if terminal { 1 } else { 25 },
        }
    }

    fn show(&mut self, bytes: u64) {
        let Some(total) = self.total else { return };
        let percent = bytes.saturating_mul(100) / total;
        if percent < self.next_percent {
            return;
        }
        let line = format!("{}: {percent} % of {} MB", self.label, total / 1_000_000);
        if self.terminal {
            eprint!("\r{line}");
            if bytes >= total {
                eprintln!();
            }
            self.next_percent = percent + 1;
        } else {
            eprintln!("{line}");
            self.next_percent = (percent / 25 + 1) * 25;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn copies_and_hashes() {
        let mut written = Vec::new();
        let mut seen = 0;
        let sha256 = copy(&mut &b"abc"[..], &mut written, |bytes| seen = bytes).unwrap();
        assert_eq!(sha256, ABC);
        assert_eq!(written, b"abc");
        assert_eq!(seen, 3);
    }

    #[test]
    fn temporary_files_are_moved_or_removed() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model.gguf");
        let kept = Temporary::beside(&target);
        fs::write(kept.path(), b"abc").unwrap();
        kept.move_to(&target).unwrap();
        assert_eq!(sha256_of(&target).unwrap(), ABC);

        let dropped = Temporary::beside(&target);
        fs::write(dropped.path(), b"half").unwrap();
        drop(dropped);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(fs::read(&target).unwrap(), b"abc");
    }
}
