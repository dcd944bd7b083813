//! The model as a folder from the Hugging Face Hub, checked with the Hub's own checksum.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ureq::Agent;
use ureq::http::HeaderMap;

use crate::download::{self, Temporary};
use crate::failure::{Failure, file_failure};

const REPOSITORY: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
const FOLDER: &str = "SmolLM2-135M-Instruct";
const WEIGHTS: &str = "model.safetensors";
/// Written last, in the format of `sha256sum`: its presence says that the folder is complete.
const CHECKSUM: &str = "model.safetensors.sha256";
const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
const OPTIONAL: [&str; 4] = [
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
];
/// Short, since many machines reach package registries only.
const CONNECT: Duration = Duration::from_secs(5);

/// The folder under `models`, if it is complete and its weights have the recorded checksum.
pub fn present(models: &Path) -> Result<Option<PathBuf>, Failure> {
    let folder = models.join(FOLDER);
    let complete = REQUIRED.iter().all(|name| folder.join(name).is_file());
    let weights = folder.join(WEIGHTS);
    let Ok(record) = fs::read_to_string(folder.join(CHECKSUM)) else {
        return Ok(None);
    };
    if !complete || !weights.is_file() {
        return Ok(None);
    }
    let expected = record.split_whitespace().next().unwrap_or_default();
    if download::sha256_of(&weights)? == expected {
        return Ok(Some(folder));
    }
    eprintln!("{}: wrong checksum, fetching it again.", weights.display());
    Ok(None)
}

/// Downloads the folder into `models`, honoring `HF_ENDPOINT` and `HF_TOKEN`.
pub fn fetch(models: &Path) -> Result<PathBuf, Failure> {
    let endpoint = non_empty("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
    let headers: Vec<(&str, String)> = non_empty("HF_TOKEN")
        .map(|token| ("authorization", format!("Bearer {token}")))
        .into_iter()
        .collect();
    fetch_from(&download::agent(CONNECT), &endpoint, &headers, models)
}

fn non_empty(variable: &str) -> Option<String> {
    let value = env::var(variable).ok()?.trim().to_owned();
    (!value.is_empty()).then_some(value)
}

fn fetch_from(
    agent: &Agent,
    endpoint: &str,
    headers: &[(&str, String)],
    models: &Path,
) -> Result<PathBuf, Failure> {
    let address = |revision: &str, name: &str| {
        let endpoint = endpoint.trim_end_matches('/');
        format!("{endpoint}/{REPOSITORY}/resolve/{revision}/{name}")
    };
    let weights = describe_weights(agent, &address("main", WEIGHTS), headers)?;

    let target = models.join(FOLDER);
    let folder = Temporary::beside(&target);
    fs::create_dir_all(folder.path()).map_err(file_failure(folder.path(), "create"))?;
    for name in REQUIRED.into_iter().chain(OPTIONAL) {
        let url = address(&weights.revision, name);
        match download::get(agent, &url, headers) {
            Ok(response) => {
                download::save(response, &url, &folder.path().join(name))?;
            }
            Err(Failure::Status { status: 404, .. }) if OPTIONAL.contains(&name) => {}
            Err(failure) => return Err(failure),
        }
    }

    let path = folder.path().join(WEIGHTS);
    let url = address(&weights.revision, WEIGHTS);
    let got = download::save(download::get(agent, &url, headers)?, &url, &path)?;
    if got != weights.sha256 {
        return Err(Failure::Checksum {
            path,
            expected: weights.sha256,
            got,
        });
    }
    let record = folder.path().join(CHECKSUM);
    fs::write(&record, format!("{got}  {WEIGHTS}\n")).map_err(file_failure(&record, "write"))?;
    folder.move_to(&target)?;
    Ok(target)
}

/// What the Hub says about the weights before any redirect to its storage.
struct Weights {
    sha256: String,
    /// The commit, so that all files come from the same one.
    revision: String,
}

fn describe_weights(
    agent: &Agent,
    url: &str,
    headers: &[(&str, String)],
) -> Result<Weights, Failure> {
    let mut request = agent.head(url);
    for (name, value) in headers {
        request = request.header(*name, value.as_str());
    }
    // The storage behind the redirect does not repeat the checksum.
    let response = request
        .config()
        .max_redirects(0)
        .build()
        .call()
        .map_err(|error| Failure::Download {
            url: url.to_owned(),
            reason: error.to_string(),
        })?;
    let status = response.status();
    if !status.is_success() && !status.is_redirection() {
        return Err(Failure::Status {
            url: url.to_owned(),
            status: status.as_u16(),
        });
    }
    let sha256 = text(response.headers(), "x-linked-etag")
        .and_then(sha256_of_etag)
        .ok_or_else(|| Failure::Download {
            url: url.to_owned(),
            reason: "the server names no sha256 (header X-Linked-Etag)".to_owned(),
        })?;
    let revision = text(response.headers(), "x-repo-commit")
        .filter(|commit| commit.bytes().all(|byte| byte.is_ascii_hexdigit()))
        .unwrap_or("main")
        .to_owned();
    Ok(Weights { sha256, revision })
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .filter(|value| !value.is_empty())
}

/// The entity tag of a large file is its sha256, in quotes.
fn sha256_of_etag(etag: &str) -> Option<String> {
    let hex = etag.trim_start_matches("W/").trim_matches('"');
    let is_sha256 = hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_sha256.then(|| hex.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    /// A Hub on the loopback address whose weights are `abc`, announced as `sha256`; it has only
    /// the required files, and serves until the test process ends.
    fn hub(sha256: &str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let sha256 = sha256.to_owned();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                let request = lines.next().unwrap().unwrap();
                for line in lines.by_ref() {
                    if line.unwrap().is_empty() {
                        break;
                    }
                }
                stream
                    .write_all(answer(&request, &sha256).as_bytes())
                    .unwrap();
            }
        });
        endpoint
    }

    fn answer(request: &str, sha256: &str) -> String {
        let ok = |body: &str| {
            format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            )
        };
        let path = request.split(' ').nth(1).unwrap_or_default();
        if request.starts_with("HEAD") {
            return format!(
                "HTTP/1.1 302 Found\r\nLocation: /storage\r\nX-Linked-Etag: \"{sha256}\"\r\n\
                 X-Repo-Commit: c0ffee\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        if path.ends_with("/resolve/c0ffee/model.safetensors") {
            return ok("abc");
        }
        if REQUIRED.iter().any(|name| path.ends_with(name)) {
            return ok("{}");
        }
        "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned()
    }

    /// An agent without the environment's proxy, which would not reach the loopback address.
    fn direct() -> Agent {
        Agent::config_builder()
            .proxy(None)
            .http_status_as_error(false)
            .build()
            .new_agent()
    }

    #[test]
    fn a_complete_folder_arrives() {
        let models = tempfile::tempdir().unwrap();
        assert_eq!(present(models.path()).unwrap(), None);
        let folder = fetch_from(&direct(), &hub(ABC), &[], models.path()).unwrap();
        assert_eq!(fs::read(folder.join(WEIGHTS)).unwrap(), b"abc");
        assert_eq!(present(models.path()).unwrap(), Some(folder.clone()));
        fs::write(folder.join(WEIGHTS), "abd").unwrap();
        assert_eq!(present(models.path()).unwrap(), None);
    }

    #[test]
    fn damaged_weights_leave_nothing_behind() {
        let models = tempfile::tempdir().unwrap();
        let other = "0".repeat(64);
        let failure = fetch_from(&direct(), &hub(&other), &[], models.path()).unwrap_err();
        assert!(matches!(failure, Failure::Checksum { .. }), "{failure}");
        assert_eq!(fs::read_dir(models.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_a_sha256_is_taken_from_an_etag() {
        assert_eq!(sha256_of_etag(&format!("\"{ABC}\"")).as_deref(), Some(ABC));
        assert_eq!(
            sha256_of_etag(&format!("W/\"{ABC}\"")).as_deref(),
            Some(ABC)
        );
        assert_eq!(sha256_of_etag("\"c0ffee\""), None);
    }
}
