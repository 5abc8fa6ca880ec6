"""The kinds of evidence that this version knows, by the names that manifests use. A new one is a line here."""

from attest.providers import Platform, mock, nitro, snp, tdx

PLATFORMS: dict[str, Platform] = {
    module.PLATFORM.name: module.PLATFORM
    for module in (
        mock,
        nitro,
        snp,
        tdx,
    )
}
